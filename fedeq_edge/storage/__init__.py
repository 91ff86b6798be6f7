"""State on disk: sealed files, an exclusive lock, a client's memory, an aggregator's contributions, duals and history.

A file that says where things stand is written whole to a neighbour, flushed to the disk and renamed, so that after a
power cut it is the old or the new one. A damaged file is never silently replaced: it is named, and the operator
decides.

An aggregator's folder:

    snapshot                the state at one moment (protocol/aggregator.py, rule 2), and how far the contributions
                            below are part of it
    contributions/N.log     the contributions, in the order in which they were accepted (contributions.py)
    duals/ID.VERSION        nu of each member at one moment; the contributions that moved it since are in the log
    privacy.key             of a private federation: from it and the sums come the noise and the cohorts
    rounds.jsonl            history, one line a round and a report
    status.json             for people and programs that look
"""

from fedeq_edge.finite import finite
from fedeq_edge.storage.aggregator import AggregatorFolder, privacy_key
from fedeq_edge.storage.client import ClientFolder
from fedeq_edge.storage.contributions import Record, audit_trail
from fedeq_edge.storage.duals import DiskDuals
from fedeq_edge.storage.files import SEAL, load, locked, save, write_atomically
from fedeq_edge.storage.status import history

__all__ = [
    "SEAL",
    "AggregatorFolder",
    "ClientFolder",
    "DiskDuals",
    "Record",
    "audit_trail",
    "finite",
    "history",
    "load",
    "locked",
    "privacy_key",
    "save",
    "write_atomically",
]
