"""The answering process: `python -m fedeq_edge.serving SOCKET_NUMBER STATE IDLE_S [GRAPHS...]`, started by listener.py.

It leaves after IDLE_S without requests, and at once when its stdin is closed: the link has left, or has died.
"""

import os
import socket
import sys
import threading
from pathlib import Path

from fedeq_edge import logs
from fedeq_edge.serving.newest import Newest
from fedeq_edge.serving.server import AnswerServer


def main(arguments: list[str]) -> None:
    """Answer until nobody asks any more."""
    logs.configure()
    number, state, idle_s, *graphs = arguments
    threading.Thread(target=_leave_with_the_link, name="link", daemon=True).start()
    with socket.socket(fileno=int(number)) as listening:
        AnswerServer(listening, Newest(Path(state), [Path(folder) for folder in graphs])).serve_until_idle(
            float(idle_s)
        )


def _leave_with_the_link() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock a thread must not hold when Python ends
    os._exit(0)  # other threads may be deep in a solve; nothing is written anywhere


if __name__ == "__main__":
    main(sys.argv[1:])
