"""Ends an installer at each of its steps in turn, and looks at what the board is then; run by test_release_kills.py.

    kill_everywhere.py TEMPLATE WORK VERSIONS COMMAND...

Every time a copy of the root TEMPLATE runs `release.py COMMAND` in a process that ends by os._exit before its k-th
step; then `release.py boot`, as the unit does, or `release.py sweep`, by turns; then the unit's starts until it is up,
and the command again. Prints JSON: per k the step and what is wrong, if anything is. One program that forks, because
there are hundreds of steps; and only what is cut needs a process of its own.
"""

import contextlib
import functools
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedeq_edge.provision import release

KILLED: Final = 77


def main(template: Path, work: Path, versions: set[str], command: list[str]) -> None:
    """Until the command gets to its end."""
    make_quick(template, command)
    found: list[tuple[str, list[str]]] = []
    while True:
        root = work / str(len(found)) / "root"
        shutil.copytree(template, root, symlinks=True)
        step = root.parent / "step"
        status = cut(root, command, len(found), step)
        if status != KILLED:
            break
        swept = len(found) % 2 == 1
        called(root, ["sweep" if swept else "boot"])
        found.append((step.read_text(), wrong(root, versions, swept=swept) + unit_down(root)))
        if called(root, command) not in (0, release.Exit.ROLLED_BACK):
            found[-1][1].append("and the command does not end well when it is run again")
    if status not in (0, release.Exit.ROLLED_BACK):
        found.append(("end", [f"the command that nobody cuts ends with {status}"]))
    print(json.dumps(found))


def make_quick(template: Path, command: list[str]) -> None:
    """What every child would do alike is done here, once; none of it is a step, and none touches the board."""
    os.sync, os.fsync = (
        lambda: None,
        lambda fd: None,
    )  # a process that ends loses no page, so that syncing would prove nothing here
    release.parser = functools.cache(release.parser)
    options = release.parser().parse_args(["--root", str(template), *command])
    release.signed = functools.cache(release.signed)
    if options.command == "install":
        key = (template / "opt/fedeq-edge/bundle.pub").read_bytes()
        release.Bundle(options.bundle, options.sha256, release.public_key(key))
    gc.freeze()  # else each child's collector copies every page


def cut(root: Path, command: list[str], die_at: int, note: Path) -> int:
    """The exit status of release.py, in a process that is over at its step of this number, counted from 0.

    It is KILLED then, and `note` names the step.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen, status = 0, 1

    def told(name: str) -> None:
        nonlocal seen
        if seen == die_at:
            note.write_text(name)
            os._exit(KILLED)
        seen += 1

    try:
        status = called(root, command, told)
    finally:
        os._exit(status)


def called(root: Path, command: list[str], told: Callable[[str], None] = lambda _: None) -> int:
    """The exit status of release.py, of which nothing is printed."""
    with Path(os.devnull).open("w") as nobody, contextlib.redirect_stdout(nobody), contextlib.redirect_stderr(nobody):
        return release.main(["--root", str(root), *command], told)


def unit_down(root: Path) -> list[str]:
    """What the unit is like after three starts, each of which calls boot, and ready if it gets so far."""
    board = release.Board(root)
    version = board.current()
    for _ in range(3):
        called(root, ["boot"])
        version = board.current()
        if version is None:
            return []
        if (board.releases / version / "config/health").read_text() == "ok":
            called(root, ["ready"])
            return [] if board.state().trial is None else [f"{version} runs and is not confirmed"]
    return [f"{version} is tried again and again"]


def wrong(root: Path, versions: set[str], *, swept: bool) -> list[str]:
    """What is not as it must be after any power cut."""
    board = release.Board(root)
    current, state = board.current(), board.state()
    if current is None:
        return [] if "" in versions else ["there is no current release"]
    complaints = [] if current in versions else [f"{current} is current"]
    if not board.intact(current):
        complaints.append(f"{current} is not what its manifest says")
    if state.trial is None and state.confirmed != current:
        complaints.append(f"{state.confirmed} is confirmed and {current} is current")
    if state.trial is not None and state.trial.version != current:
        complaints.append(f"{state.trial.version} is on trial and {current} is current")
    if not all(board.intact(version) for version in state.history):
        complaints.append("a release to go back to is not what its manifest says")
    if swept and any(path.name.startswith(".") for path in board.releases.iterdir()):
        complaints.append("something is left in releases/")
    return complaints


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), set(sys.argv[3].split(",")), sys.argv[4:])
