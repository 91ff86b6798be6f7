"""`fedeq demo`: a whole fleet on one machine, every part of it real.

Broker, aggregator and agents are the programs that run in the field, as processes of their own; only the boards are
emulated, by scaling what a training step costs with the board's relative speed (and everything shown says so).
"""
