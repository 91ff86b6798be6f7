"""What an operator orders of an aggregator: small files in its state folder, obeyed within half a second.

A file outlives a restart, needs no open port, and who may write it is the file system's business. The order is the
name of the file; its content is not read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, get_args

from fedeq_edge.errors import StateError
from fedeq_edge.wire.topics import check_identifier

Order = Literal["deny", "allow", "retire"]
_ORDERS: Final[tuple[Order, ...]] = get_args(Order)
_FOLDER: Final = "orders"


def give(state: Path, order: Order, device: str) -> None:
    """The aggregator with this state folder will obey, at once if it runs. Raises StateError where it cannot hear."""
    check_identifier(device, "device")
    try:
        (state / _FOLDER).mkdir(exist_ok=True)
        number = max((number for number, _, _, _ in _given(state)), default=0) + 1
        (state / _FOLDER / f"{number}.{order}.{device}").touch()
    except OSError as error:
        raise StateError(f"cannot write an order to {state}: {error.strerror}; has an aggregator run here?") from error


def taken(state: Path) -> Iterator[tuple[Order, str]]:
    """(order, device) of each order in the order given; it is forgotten once the next one is asked for."""
    for _, order, device, path in sorted(_given(state)):
        yield order, device
        path.unlink()


def _given(state: Path) -> Iterator[tuple[int, Order, str, Path]]:
    """(number, order, device, file) of each file that is an order."""
    for path in (state / _FOLDER).glob("*.*.*"):
        number, name, device = path.name.split(".", 2)
        for order in _ORDERS:
            if order == name and number.isdecimal():
                yield int(number), order, device, path
