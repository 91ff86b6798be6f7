"""The agent's first heartbeat, as one JSON line on stdout: sent over stdin to the board's python3, which needs no more.

    python3 - STATUS_FILE SECONDS

Waits until the agent that runs now says that its broker took it, or the seconds are over. The status of an agent that
ran before does not count: its pid is another. Standard library only, python >= 3.8.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

UNIT = "fedeq-agent.service"
POLL_S = 0.2
LINES = "12"  # of the journal, where there is no heartbeat


def said(*argv: str) -> str:
    """What a command prints, empty where it is not there."""
    try:
        return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout.decode()
    except OSError:
        return ""


def broker(path: Path) -> str:
    """What the agent that runs now says of its broker, empty where it has not said anything yet."""
    pid = said("systemctl", "show", UNIT, "--property=MainPID", "--value").strip()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("broker", "")) if str(found.get("pid")) == pid else ""


def main(path: Path, seconds: float) -> None:
    """Print active, broker, and the journal's last lines where the broker is not "connected"."""
    until = time.monotonic() + seconds
    while (seen := broker(path)) != "connected" and time.monotonic() < until:
        time.sleep(POLL_S)
    active = said("systemctl", "is-active", UNIT).strip()
    journal = ["journalctl", "--unit", UNIT, "--lines", LINES, "--no-pager", "--output", "cat"]
    print(json.dumps({"active": active, "broker": seen, "journal": "" if seen == "connected" else said(*journal)}))


main(Path(sys.argv[1]), float(sys.argv[2]))
