"""Log lines: for people on a terminal, JSON lines otherwise, always on stderr (journald does the rest)."""

import json
import logging
import sys
import time

from fedeq_edge.finite import finite

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    def __init__(self, *, for_people: bool) -> None:
        super().__init__()
        self._for_people = for_people

    def format(self, record: logging.LogRecord) -> str:
        facts = {key: value for key, value in vars(record).items() if key not in _OWN}
        if self._for_people:
            told = " ".join(f"{key}={_short(value)}" for key, value in facts.items())
            text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.getMessage()} {told}".rstrip()
        else:
            line = {"at": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
            text = json.dumps(finite(line | facts), default=str)
        return text if record.exc_info is None else f"{text}\n{self.formatException(record.exc_info)}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def configure(level: int = logging.INFO) -> None:
    """Send fedeq_edge's log to stderr; called once by a program, never by the library."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(for_people=sys.stderr.isatty()))
    logger = logging.getLogger("fedeq_edge")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
