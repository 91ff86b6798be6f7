"""Equilibrium federations on Flower's engine: our client as a ClientApp, our aggregator as a Strategy.

Both take the settings that `fedeq aggregator run` takes, so that one aggregator.toml runs on either engine. With the
same data, names of devices and budgets of the solver the consensus is the same on both, bit for bit.

    content.py     what a Flower message carries: frames of our own protocol (wire/messages.py), never a pickle
    client.py      query: who I am; train: a round; evaluate: the personal model
    memory.py      what a client keeps between messages: consensus, dual, head, pending contribution
    server.py      rounds, checks and sums of our aggregator, without Flower
    strategy.py    the same as Flower calls it
    example/       a federation on scikit-learn's digits for `flwr run`; `python -m fedeq_edge.flower DIR` copies it

What Flower does not carry: rounds in the background (schedule.mode = "async"), late contributions, masking, privacy,
audit and trees. A round lasts as long as Flower waits for it; who has not answered by then has sat it out.
"""

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

try:
    import flwr as _flwr  # noqa: F401  # here, so that its absence is said once and in one line
except ImportError as error:
    raise ImportError("Flower is not installed; run pip install 'fedeq-edge[flower]'") from error

from fedeq_edge.flower.client import LoadData, client_app
from fedeq_edge.flower.strategy import ConsensusStrategy

__all__ = ["ConsensusStrategy", "LoadData", "client_app"]
