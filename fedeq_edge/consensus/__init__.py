"""Weighted consensus ADMM: numpy only; no clock, file, socket or logger (algorithm.md, section 4)."""

from fedeq_edge.consensus.admm import Consensus, DualStore, Member, MemoryDuals, RoundReport, advance_dual
from fedeq_edge.consensus.constraint import Constraint, MonotoneBound, RowBound, SpectralBound, feasible, project
from fedeq_edge.consensus.methods import METHODS, Method, method

__all__ = [
    "METHODS",
    "Consensus",
    "Constraint",
    "DualStore",
    "Member",
    "MemoryDuals",
    "Method",
    "MonotoneBound",
    "RoundReport",
    "RowBound",
    "SpectralBound",
    "advance_dual",
    "feasible",
    "method",
    "project",
]
