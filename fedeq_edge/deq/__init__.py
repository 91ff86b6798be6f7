"""Equilibrium models: cells, solvers with an exact budget, gradients at the fixed point.

Import from the modules. `spec`, `layout`, `initial` and `wellposed` need numpy alone, so that a gateway can size, start
and project a model; `cell`, `solution`, `solvers`, `adjoints` and `model` need torch. This file stays free of both.
"""
