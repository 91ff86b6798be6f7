"""Experiments on one machine: the real client and aggregator over virtual time, every method measured alike."""
