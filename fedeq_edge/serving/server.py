"""HTTP for applications on the same device: standard library only, bounded in bodies, connections and time.

    POST /v1/infer[?budget=K&tol=T]   samples as JSON or .npy; an answer per sample
    GET  /v1/health                   whether there is a model, and which

Errors are {"error": "one line"} with a 4xx status for the caller's mistakes and 503 where no model can answer.
"""

import contextlib
import logging
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import msgspec

from fedeq_edge import __version__
from fedeq_edge.errors import ConfigError, DataError, FedEqError
from fedeq_edge.serving.body import JSON, KINDS, samples
from fedeq_edge.serving.listener import LOG_NAME
from fedeq_edge.serving.newest import Model, Newest

log = logging.getLogger(__name__)

# A thousand windows of 9 sensors and 100 moments as float32; parsed from JSON it takes up to 25 times as much memory.
LARGEST_BODY: Final = 4 * 2**20
# On one core more answers at once only take longer each; the rest wait in the kernel's backlog.
MOST_CONNECTIONS: Final = 8
# Between two packets of a request, and between two requests of a connection that stays open.
PATIENCE_S: Final = 10.0
_LINGER_S: Final = 1.0
_LOOPBACK_NAMES: Final = ("127.0.0.1", "localhost")
_INFER, _HEALTH = "/v1/infer", "/v1/health"
_METHODS: Final = {_INFER: "POST", _HEALTH: "GET"}


class RefusalError(Exception):
    """A request that is not answered: `status`, and one line that says why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class AnswerServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers at a socket that is listened at already, of either family, one thread a connection."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, newest: Newest) -> None:
        super().__init__(("", 0), AnswerHandler, bind_and_activate=False)
        self.socket.close()  # the one that the base class has made
        self.socket = listening
        self.newest = newest
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._idle_since: float | None = time.monotonic()
        self._open = 0
        self._counting = threading.Lock()

    def serve_until_idle(self, idle_s: float) -> None:
        """Return after `idle_s` seconds in which there was no connection."""
        self.timeout = idle_s
        while not self._rested(idle_s):
            self.handle_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Wait for a free place, then answer in a thread."""
        self._places.acquire()
        with self._counting:
            self._open, self._idle_since = self._open + 1, None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and leave the place to the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._open -= 1
                self._idle_since = None if self._open else time.monotonic()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # the base class's
        """A caller that hangs up is no event."""
        log.debug("a connection broke", exc_info=True)

    def _rested(self, idle_s: float) -> bool:
        with self._counting:
            return self._idle_since is not None and time.monotonic() - self._idle_since >= idle_s


class AnswerHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = f"fedeq-edge/{__version__}"
    sys_version = ""
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        """Health."""
        self._answer(self._health)

    def do_POST(self) -> None:
        """Inference."""
        self._answer(self._infer)

    def _answer(self, make: Callable[[], Mapping[str, object]]) -> None:
        reply: Mapping[str, object]
        try:
            self._check_target()
            reply, status = make(), HTTPStatus.OK
        except RefusalError as refusal:
            reply, status = {"error": str(refusal)}, refusal.status
        except (DataError, ConfigError) as error:
            reply, status = {"error": str(error)}, HTTPStatus.BAD_REQUEST
        except FedEqError as error:
            reply, status = {"error": str(error)}, HTTPStatus.SERVICE_UNAVAILABLE
        except Exception:  # a defect of ours: one request fails, the traceback stays
            log.exception("a request failed")
            reply, status = {"error": f"a defect; {LOG_NAME} says more"}, HTTPStatus.INTERNAL_SERVER_ERROR
        self._reply(status, reply)

    def _check_target(self) -> None:
        """The path and method exist; and no page in a browser got here under a name of its own (DNS rebinding)."""
        path = urlsplit(self.path).path
        if path not in _METHODS:
            raise RefusalError(HTTPStatus.NOT_FOUND, f"no {path} here; ask POST {_INFER} or GET {_HEALTH}")
        if self.command != _METHODS[path]:
            raise RefusalError(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {_METHODS[path]}")
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.connection.family != socket.AF_UNIX and name not in _LOOPBACK_NAMES:
            raise RefusalError(
                HTTPStatus.FORBIDDEN, f"Host is {name!r}; only {' and '.join(_LOOPBACK_NAMES)} are answered"
            )

    def _health(self) -> dict[str, object]:
        return {"status": "ok", "model": self._model().facts}

    def _infer(self) -> dict[str, object]:
        wanted = _options(urlsplit(self.path).query)
        x = samples(*self._body())
        return self._model().answer(x, budget=wanted.budget, tol=wanted.tol)

    def _model(self) -> Model:
        assert isinstance(self.server, AnswerServer)
        return self.server.newest.model()

    def _body(self) -> tuple[str, bytes]:
        """(content type, content)"""
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        # Also what keeps pages in a browser out: these types make it ask first, which is refused.
        if kind not in KINDS:
            raise RefusalError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type is {kind!r}; send {' or '.join(KINDS)}"
            )
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit()):
            raise RefusalError(HTTPStatus.LENGTH_REQUIRED, "the body needs a Content-Length; it cannot come in chunks")
        if len(text) > 9 or int(text) > LARGEST_BODY:
            raise RefusalError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{text} bytes; send at most {LARGEST_BODY} at once"
            )
        return kind, self._read(int(text))

    def _read(self, size: int) -> bytes:
        try:
            raw = self.rfile.read(size)
        except TimeoutError as error:
            raise RefusalError(HTTPStatus.REQUEST_TIMEOUT, f"the body stopped for {PATIENCE_S:.0f} s") from error
        if len(raw) < size:
            raise RefusalError(HTTPStatus.BAD_REQUEST, f"the body ends after {len(raw)} of {size} bytes")
        return raw

    def _reply(self, status: HTTPStatus, reply: Mapping[str, object]) -> None:
        content = msgspec.json.encode(reply) + b"\n"
        if status >= HTTPStatus.BAD_REQUEST:
            self.close_connection = True  # what is left of the request is not the next one
        self.send_response(status)
        self.send_header("Content-Type", JSON)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002  # the base class's
        """What the standard library refuses by itself, in our form."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._reply(status, {"error": message or status.phrase})

    def finish(self) -> None:
        """Let the caller read a refusal before the connection goes: what it still sends would reset it."""
        super().finish()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER_S)
            ends = time.monotonic() + _LINGER_S
            while time.monotonic() < ends and self.connection.recv(2**16):
                pass

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # the base class's name
        """For those who look: what is asked of a model is nobody else's business."""
        log.debug(format, *arguments)


class _Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    budget: int | None = None
    tol: float | None = None


def _options(query: str) -> _Options:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=8)
        options = msgspec.convert(dict(pairs), _Options, strict=False)
    except ValueError as error:  # of both
        raise ConfigError(f"query: {error}; give budget=K and tol=T") from error
    if options.tol is not None and not math.isfinite(options.tol):
        raise ConfigError("query: tol is not finite; give a number of at least 0")
    return options
