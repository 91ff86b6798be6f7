"""A model and a plan to start from, by the kind of data: what the measurements of this project support (no torch).

All settings were chosen on validation parts cut from the training data, never on test parts; the figures stand in
BENCHMARKS of the README. They are starting points for data of about the size named, not optima.
"""
