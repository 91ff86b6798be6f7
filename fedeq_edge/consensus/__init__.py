"""Weighted consensus ADMM on exact integers: numpy only; no clock, file, socket or logger (algorithm.md, section 4)."""

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.constraint import Constraint, MonotoneBound, RowBound, SpectralBound, feasible, project
from fedeq_edge.consensus.duals import DualStore, MemoryDuals
from fedeq_edge.consensus.fixed import (
    dual_step,
    dual_value,
    fixed_penalty,
    fraction_bits,
    penalty_of,
    scaled,
)
from fedeq_edge.consensus.methods import METHODS, Method, method
from fedeq_edge.consensus.records import Member, PartialSum, RoundReport

__all__ = [
    "METHODS",
    "Consensus",
    "Constraint",
    "DualStore",
    "Member",
    "MemoryDuals",
    "Method",
    "MonotoneBound",
    "PartialSum",
    "RoundReport",
    "RowBound",
    "SpectralBound",
    "dual_step",
    "dual_value",
    "feasible",
    "fixed_penalty",
    "fraction_bits",
    "method",
    "penalty_of",
    "project",
    "scaled",
]
