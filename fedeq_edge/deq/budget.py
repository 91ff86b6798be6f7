"""How much work anybody may ask of a solve. Imports nothing, for a program that only answers starts with it."""

from typing import Final

LARGEST_BUDGET: Final = 10_000
"""Evaluations per sample that a call may ask for and a contribution may report: far beyond any solve worth its time."""
