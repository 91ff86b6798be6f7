"""Whole federations in one process: the machines of `protocol/` over the in-memory broker, in virtual time.

What differs from a fleet of boards is the shell alone: a queue of events in place of clocks and sockets (engine.py),
files shared by all clients in place of their disks (vectors.py, journal.py), and workers that train for whoever is
at work in place of trainer processes (workers.py, ray_workers.py). The results of training are real.
"""
