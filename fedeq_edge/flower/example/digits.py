"""Ten devices learn handwritten digits with Flower; each has five of the ten digits, 60 images of them.

    flwr run . --federation-config num-supernodes=10 --stream

Every node is a device with a small budget of the equilibrium solver. Replace `load` and the model for your own data.
"""

# pyright: reportMissingImports=false

from collections.abc import Mapping
from functools import cache

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from msgspec.structs import replace

from fedeq_edge.data.digits import digits_fleet
from fedeq_edge.data.npz import ClientData
from fedeq_edge.flower import ConsensusStrategy, client_app
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.training.recommend import recommend

MODEL, PLAN, METHOD = recommend((1, 8, 8), 10)
SETTINGS = AggregatorSettings(
    federation="digits",
    model=MODEL,
    train=replace(PLAN, rounds=10, epochs=2),
    method={"preset": METHOD.name, "heads": METHOD.heads},
    codec="int8",
)


@cache
def fleet(devices: int) -> dict[str, ClientData]:
    """All data, cut among so many devices."""
    return digits_fleet(devices=devices)


def load(node: Mapping[str, int]) -> ClientData:
    """The data of one node."""
    return fleet(node["num-partitions"])[f"device-{node['partition-id']}"]


client = client_app(SETTINGS, load)
server = ServerApp()


@server.main()
def main(grid: Grid, _: Context) -> None:
    """Run the federation, and say how well each device's personal model does."""
    strategy = ConsensusStrategy(SETTINGS)
    strategy.start(grid)
    for device, report in sorted(strategy.reports.items()):
        print(f"{device}: personal model {report.accuracy_personal:.1%}, consensus {report.accuracy_consensus:.1%}")
