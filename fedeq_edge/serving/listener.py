"""The link's side: a socket that is listened at, and a process behind it only while somebody asks.

Theory of operation. A thread waits until a connection is there, without accepting it, and starts the answering process
with the listening socket. That process accepts, answers, and leaves after a rest; the thread waits again. What comes
in between waits in the kernel's backlog and is seen at once. So a device at rest holds neither model nor runtime, a
runtime that crashes takes neither link nor training along, and training never waits for an answer or the reverse.
"""

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedeq_edge.serving.address import Address, listen

log = logging.getLogger(__name__)

LOG_NAME: Final = "answers.log"
# A process that cannot start would otherwise be started as often as the board can.
_PAUSE_S: Final = 1.0


class Listener:
    """Answers are to be had at `address` from now on, until `stop`; raises ConfigError where they cannot be.

    state: the folder with the personal model. idle_s: the answering process leaves after so long without requests.
    graphs: folders where releases and updates put models.
    """

    def __init__(self, address: Address, state: Path, *, idle_s: float, graphs: Sequence[Path] = ()) -> None:
        self._address = address
        self._socket = listen(address)
        self._log_path = state / LOG_NAME
        words = (self._socket.fileno(), state, idle_s, *graphs)
        self._command = [sys.executable, "-m", "fedeq_edge.serving", *map(str, words)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="answers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nobody listens there any more, and the answering process has left."""
        with self._lock:
            os.close(self._stop_write)  # readable for select from now on
            if self._process is not None:
                _dismiss(self._process)
        self._thread.join()
        self._socket.close()
        os.close(self._stop_read)
        if self._address.path is not None:
            self._address.path.unlink(missing_ok=True)

    def _watch(self) -> None:
        while self._asked():
            try:
                fault = self._answer()
            except OSError as error:  # a full disk, no memory for a process
                fault = str(error)
            if fault:
                log.warning("the answering process failed", extra={"reason": fault, "log": str(self._log_path)})
                self._stopped(within_s=_PAUSE_S)

    def _answer(self) -> str:
        """An answering process has come and gone; what went wrong with it, or nothing."""
        process = self._start()
        if process is None:
            return ""
        with process:
            status = process.wait()
        return f"status {status}" if status else ""

    def _asked(self) -> bool:
        """Wait until a connection is there; False when there is to be an end."""
        select.select([self._socket.fileno(), self._stop_read], [], [])
        return not self._stopped(within_s=0.0)

    def _stopped(self, *, within_s: float) -> bool:
        return bool(select.select([self._stop_read], [], [], within_s)[0])

    def _start(self) -> "subprocess.Popen[bytes] | None":
        """The answering process, None where `stop` came first. Its stdin is closed when it is to leave, or we die."""
        with self._lock:
            if self._stopped(within_s=0.0):
                return None
            with self._log_path.open("ab") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"},
                    pass_fds=[self._socket.fileno()],
                )
            return self._process


def _dismiss(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
