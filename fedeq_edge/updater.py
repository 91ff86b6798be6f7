"""`python -m fedeq_edge.updater`: a board's side of updates, as root, by fedeq-updater.service.

Theory of operation. It is there all the time, on boards with 512 MB: so what it loads is a JSON library and TLS. It
reports, and where the answer asks for something, or once a day, it starts itself once more with --once: that process
renews the certificate and does what is asked (provision/updater.py), and takes the memory of its libraries with it.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedeq_edge import logs
from fedeq_edge.errors import Exit, FedEqError, ProvisionError
from fedeq_edge.provision.actions import Action
from fedeq_edge.provision.reporting import Board, Task, report, run_program, service_of, task_of

_DAY_S: Final = 86_400.0
_AGAIN_S: Final = 3600.0  # after a renewal that failed; there is half a year for it
_WORK_S: Final = 7200.0  # a release over a link of 20 kB/s takes most of it

logger = logging.getLogger(__name__)


class Loop:
    """Reports, turn by turn. Raises StateError where the board is not enrolled."""

    def __init__(self, board: Board) -> None:
        service_of(board)
        self._board = board
        self._trouble = ""
        self._renews_at = float("-inf")

    def turn(self) -> None:
        """The fleet has heard how things are, and what it asked for is done. Raises FedEqError where it is not."""
        now = time.monotonic()
        try:
            if now >= self._renews_at:
                self._renews_at = now + _AGAIN_S
                self._work()
                self._renews_at = now + _DAY_S
                return
            task = task_of(self._board)
            if _is_work(task, report(self._board, task, self._trouble).action):
                self._work()
        except FedEqError as error:
            self._trouble = str(error)
            raise
        self._trouble = ""

    def _work(self) -> None:
        options = ["--once", "--root", str(self._board.root), f"--trouble={self._trouble}"]
        ended = run_program([sys.executable, "-m", "fedeq_edge.updater", *options], _WORK_S)
        if ended.returncode == Exit.BUSY:
            logger.info("not yet", extra={"reason": ended.stderr.strip()})  # that of the release before ends its work
        elif ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"the updater's work ended with {ended.returncode}"]
            raise FedEqError(lines[-1].removeprefix("fedeq: "))


def _is_work(task: Task | None, wanted: Action | None) -> bool:
    """Whether something was told, or begun, that has not ended."""
    if task is not None and task.state == "running":
        return True
    return wanted is not None and (task is None or wanted.id != task.action.id)


def once(board: Board, trouble: str = "") -> None:
    """The certificate is renewed where that is due, and what the fleet asks for is done. Raises FedEqError."""
    from fedeq_edge.provision.updater import Updater  # noqa: PLC0415  # tuf and cryptography: see above

    updater = Updater(board, trouble=trouble)
    try:
        updater.renew()
    finally:
        updater.once()


def run(board: Board, every_s: float) -> None:
    """Turn after turn, until the process ends."""
    loop = Loop(board)
    while True:
        try:
            loop.turn()
        except FedEqError as error:
            logger.warning("not this time", extra={"reason": str(error)})
        time.sleep(every_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; what is wrong is one line on stderr."""
    parser = argparse.ArgumentParser(prog="fedeq-updater", description="A board's side of updates.")
    parser.add_argument("--every", type=float, default=60.0, metavar="S", help="seconds between two reports")
    parser.add_argument("--once", action="store_true", help="report once, do what is asked, and leave")
    parser.add_argument("--root", type=Path, default=Path("/"), help="of the system")
    parser.add_argument("--trouble", default="", help="why the turn before failed, for the report")
    options = parser.parse_args(arguments)
    logs.configure()
    try:
        if options.once:
            once(Board(options.root), options.trouble)
        else:
            run(Board(options.root), options.every)
    except FedEqError as error:
        print(f"fedeq: {error}", file=sys.stderr)
        return int(error.exit) if isinstance(error, ProvisionError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
