"""Data of a fleet: readers of users' .npz files, partitions, and the demo's digits."""

from fedeq_edge.data.digits import digits_fleet
from fedeq_edge.data.npz import (
    ClientData,
    ClientSummary,
    FleetSummary,
    describe,
    load_client,
    load_fleet,
    save_client,
)
from fedeq_edge.data.partition import by_labels, dirichlet, label_sets

__all__ = [
    "ClientData",
    "ClientSummary",
    "FleetSummary",
    "by_labels",
    "describe",
    "digits_fleet",
    "dirichlet",
    "label_sets",
    "load_client",
    "load_fleet",
    "save_client",
]
