"""Readers of public data sets in the form in which their authors publish them."""

from fedeq_edge.data.archives.kinds import KINDS, read
from fedeq_edge.data.archives.samples import Samples
from fedeq_edge.data.archives.source import Source

__all__ = ["KINDS", "Samples", "Source", "read"]
