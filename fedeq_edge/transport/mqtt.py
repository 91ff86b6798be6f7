"""MQTT by paho: QoS 1, our own window, our own reconnect. The only module that imports the MQTT client.

Theory of operation.
- QoS 1 and idempotent messages. QoS 2 is not an option: with paho 2.2 and mosquitto 2.0 messages queued at QoS 2 are
  silently lost (paho ignores the broker's Receive Maximum).
- A fresh paho client for every connection, clean session. paho keeps unacknowledged messages in memory and floods the
  broker with them on reconnecting; the protocol above says again what matters, so nothing is kept here instead.
- At most `WINDOW` packets wait for the broker's acknowledgement; the rest wait in a queue of ours, and nothing is
  published while disconnected (paho would queue it without bound).
- A packet over the broker's limit is refused before it is sent: paho would reconnect and resend it for ever.
- Reconnecting waits a random time up to a bound that doubles (full jitter), so that a fleet does not stampede a broker
  that comes back. Only a connection that has lasted makes the bound small again: two devices with one name, whom the
  broker throws out in turn, would otherwise fight for ever at full speed.
- One thread a connection, by paho's external loop: the keeper connects, reads, and writes what a full socket has left
  over; whoever publishes writes at once, without waking anybody. paho's own thread would be a second one, to be woken
  for each packet.
- TCP_NODELAY, because small packets at QoS 1 otherwise wait 40 ms for Nagle.
"""

import contextlib
import logging
import random
import re
import select
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import SplitResult, unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fedeq_edge.errors import ConfigError, TransportError
from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event, Traffic, Will, matches

log = logging.getLogger(__name__)

Version = Literal["3.1.1", "5"]

WINDOW: Final = 8  # below mosquitto's Receive Maximum of 20 and every cloud broker's
KEEPALIVE_S: Final = 60  # a 64 kB chunk needs 8 s at 8 kB/s; shorter keepalives cut slow links off
_BACKOFF_FIRST_S: Final = 1.0
_BACKOFF_LAST_S: Final = 60.0
_SETTLED_S: Final = 30.0  # a takeover or a packet over the limit ends a connection within seconds
_PATIENCE_S: Final = 15.0  # for TCP, CONNACK and SUBACK together
_PUBACK_BYTES: Final = 4
_TURN_S: Final = 5.0  # or a quarter of the keepalive; a ping may be so late, brokers wait for half a keepalive more


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the broker is and how to prove who we are.

    url: mqtt://host[:port] or mqtts://host[:port]; user and password as in any URL. version: "3.1.1" or "5".
    ca, certificate, key: PEM files for mqtts (mutual TLS when the last two are given).
    """

    url: str
    version: Version = "5"
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def address(self) -> tuple[str, int, bool]:
        """(host, port, whether TLS). Raises ConfigError on an URL that is no broker's."""
        parts = self._parts()
        tls = parts.scheme == "mqtts"
        assert parts.hostname is not None  # _parts has seen to it
        return parts.hostname, parts.port or (8883 if tls else 1883), tls

    def credentials(self) -> tuple[str | None, str | None]:
        """(user, password) of the URL, percent-decoded."""
        parts = self._parts()
        user, password = parts.username, parts.password
        return None if user is None else unquote(user), None if password is None else unquote(password)

    def shown(self) -> str:
        """The URL for people and logs: without user and password."""
        host, port, tls = self.address()
        return f"{'mqtts' if tls else 'mqtt'}://{f'[{host}]' if ':' in host else host}:{port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """For mqtts, with the PEM files loaded; None for mqtt. Raises ConfigError where they cannot be used."""
        if self._parts().scheme != "mqtts":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"TLS files of the broker cannot be used: {error}; check broker.ca, .certificate, .key"
            ) from error
        return context

    def _parts(self) -> SplitResult:
        try:
            parts = urlsplit(self.url)
            if parts.scheme in ("mqtt", "mqtts") and parts.hostname and parts.port != 0:
                return parts
        except ValueError:  # a port that is no number, half an IPv6 address
            pass
        shown = without_secrets(self.url)
        raise ConfigError(f"broker.url {shown!r} is no broker address; write mqtt://host:1883 or mqtts://host:8883")


def without_secrets(text: str) -> str:
    """`text` with ... for user and password in every URL, fit for messages, logs and reports."""
    return re.sub(r"//[^\s/]*@", "//...@", text)


def packet_bytes(topic: str, payload: bytes, version: str) -> int:
    """Size of a QoS 1 PUBLISH packet (MQTT 5 without properties adds one byte)."""
    remaining = 2 + len(topic.encode()) + 2 + (1 if version == "5" else 0) + len(payload)
    length_bytes = next(n for n in (1, 2, 3, 4) if remaining < 128**n)
    return 1 + length_bytes + remaining


@dataclass(slots=True)
class _Session:
    """One connection from its first packet to its end; every field but `turn` is guarded by the transport's condition.

    turn: to be held by whoever lets the client read or write, as paho writes in the caller's thread without a lock.
    """

    client: paho.Client
    turn: threading.RLock = field(default_factory=threading.RLock)
    subscribed: bool = False
    over: bool = False
    reason: str = ""
    packet_limit: int | None = None
    waiting: deque[tuple[str, bytes, bool]] = field(default_factory=deque)
    in_flight: int = 0  # packets that the broker has not acknowledged
    carried: int = 0  # packets that it has
    dismissed: bool = False  # the broker has ended it, and said why

    @property
    def sendable(self) -> bool:
        return bool(self.waiting) and self.in_flight < WINDOW

    @property
    def useful(self) -> bool:
        """Whether it ended with a link that breaks and has carried more than our birth: then soon try again.

        One that the broker itself has ended would be ended again, and two clients with one id would chase each other.
        """
        return self.carried > 1 and not self.dismissed

    @property
    def idle(self) -> bool:
        return not self.waiting and self.in_flight == 0


class MqttTransport:
    """A client of an MQTT broker. Events come from the keeper thread.

    client_id: stable per device, or the broker keeps sessions apart that are one. subscriptions: topic filters.

    Nobody who holds the condition asks for a session's turn: paho's callbacks are within one, and take the condition.
    """

    def __init__(
        self, endpoint: Endpoint, client_id: str, subscriptions: tuple[str, ...], *, will: Will | None = None
    ) -> None:
        self._host, self._port, _tls = endpoint.address()
        self._endpoint = endpoint
        self._client_id = client_id
        self._subscriptions = subscriptions
        self._will = will
        self._context = endpoint.tls_context()
        self._on_event: Callable[[Event], None] = lambda _event: None
        self._keeper = threading.Thread(target=self._keep_connected, name=f"mqtt[{client_id}]", daemon=True)
        self._changed = threading.Condition()
        self._bell, self._button = socket.socketpair()  # a byte ends the keeper's wait for the network
        self._button.setblocking(False)
        for end in (self._bell, self._button):
            weakref.finalize(self, end.close)
        self._stopping = False
        self._session: _Session | None = None
        self._up = 0
        self._down = 0

    # The Transport seam

    def start(self, on_event: Callable[[Event], None]) -> None:
        """Begin connecting in the background."""
        self._on_event = on_event
        self._keeper.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue for sending at QoS 1; dropped while disconnected. Raises TransportError over the broker's limit."""
        with self._changed:
            session = self._session
            if session is None or not session.subscribed or session.over:
                return
            self._check_limit(session, topic, payload)
            session.waiting.append((topic, payload, retain))
        if self._send_waiting(session):
            self._wake()

    def traffic(self) -> Traffic:
        """PUBLISH and PUBACK packets in both directions (not CONNECT, SUBSCRIBE and pings: a few bytes a minute)."""
        with self._changed:
            return Traffic(self._up, self._down)

    def stop(self, farewell: Will | None = None) -> None:
        """Publish the farewell, wait until the broker has all that was queued, disconnect."""
        if farewell is not None:
            self.publish(farewell.topic, farewell.payload, retain=True)
        with self._changed:
            session = self._session
            if session is not None and session.subscribed:
                self._changed.wait_for(lambda: session.idle or session.over, timeout=_PATIENCE_S)
            self._stopping = True
            self._changed.notify_all()
        self._wake()
        if self._keeper.is_alive():
            self._keeper.join(_PATIENCE_S)

    def _check_limit(self, session: _Session, topic: str, payload: bytes) -> None:
        size = packet_bytes(topic, payload, self._endpoint.version)
        if session.packet_limit is not None and size > session.packet_limit:
            raise TransportError(
                f"packet of {size} bytes for {topic} is over the broker's limit of {session.packet_limit} bytes; "
                "raise max_packet_size in the broker's configuration"
            )

    # The keeper thread

    def _keep_connected(self) -> None:
        bound = _BACKOFF_FIRST_S
        while not self._stopping:
            session = self._connect()
            if session.subscribed:
                since = time.monotonic()
                self._serve(session)
                if session.useful or time.monotonic() - since >= _SETTLED_S:
                    bound = _BACKOFF_FIRST_S
            self._leave(session)
            with self._changed:
                self._session = None
                if self._stopping:
                    return
            self._on_event(Disconnected(session.reason or "connection lost"))
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, timeout=random.uniform(0.0, bound))
            bound = min(2.0 * bound, _BACKOFF_LAST_S)

    def _connect(self) -> _Session:
        """A session that is subscribed, or one with the reason why not."""
        session = _Session(self._client())
        with self._changed:
            self._session = session
        self._wire(session)
        try:
            session.client.connect(self._host, self._port, KEEPALIVE_S, **self._clean_start())
        except (OSError, ValueError) as error:
            session.reason = f"broker {self._host}:{self._port}: {error}"
            return session
        until = time.monotonic() + _PATIENCE_S
        while not (session.subscribed or session.over or self._stopping) and time.monotonic() < until:
            self._turn(session, until - time.monotonic())
        if not session.subscribed and not session.reason:
            session.reason = f"broker {self._host}:{self._port} did not answer within {_PATIENCE_S:.0f} s"
        return session

    def _serve(self, session: _Session) -> None:
        """Read, and send what the window allows, until the connection is over."""
        while not (session.over or self._stopping):
            self._turn(session, min(_TURN_S, KEEPALIVE_S / 4))

    def _turn(self, session: _Session, timeout_s: float) -> None:
        """Wait for the network, or for somebody who left bytes to send, and carry what there is."""
        link = session.client.socket()
        if link is None or link.fileno() < 0:
            self._end(session, "closed the connection")
            return
        ready = self._wait(session, link, max(timeout_s, 0.0))
        with session.turn:
            if ready & ~select.POLLOUT:
                session.client.loop_read()
            elif not ready:
                session.client.loop_misc()
            if session.client.want_write():
                session.client.loop_write()
        if session.sendable:
            self._send_waiting(session)

    def _wait(self, session: _Session, link: Any, timeout_s: float) -> int:
        """What the link is ready for, as bits of poll; 0 if it is for nothing."""
        if isinstance(link, ssl.SSLSocket) and link.pending():
            return select.POLLIN
        poller = select.poll()
        poller.register(link, select.POLLIN | (select.POLLOUT if session.client.want_write() else 0))
        poller.register(self._bell, select.POLLIN)
        ready = dict(poller.poll(1e3 * timeout_s))
        if ready.pop(self._bell.fileno(), 0):
            self._bell.recv(4096)
        return next(iter(ready.values()), 0)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # BlockingIOError: so many bytes are there that it will wake anyhow
            self._button.send(b"\0")

    def _send_waiting(self, session: _Session) -> bool:
        """What the window allows is sent; whether something is left for the keeper to do."""
        with session.turn:
            if _hung_up(session.client.socket()):
                return True
            while (packet := self._next_packet(session)) is not None:
                topic, payload, retain = packet
                session.client.publish(topic, payload, qos=1, retain=retain)
            return session.client.want_write()

    def _next_packet(self, session: _Session) -> tuple[str, bytes, bool] | None:
        with self._changed:
            if session.over or not session.sendable:
                return None
            topic, payload, retain = session.waiting.popleft()
            session.in_flight += 1  # before the packet leaves: its acknowledgement may overtake us
            self._up += packet_bytes(topic, payload, self._endpoint.version)
            self._down += _PUBACK_BYTES
            return topic, payload, retain

    def _leave(self, session: _Session) -> None:
        with session.turn:
            session.client.disconnect()
            link = session.client.socket()
            if link is not None:
                link.close()

    def _clean_start(self) -> dict[str, Any]:
        return {"clean_start": True} if self._endpoint.version == "5" else {}

    def _client(self) -> paho.Client:
        protocol = paho.MQTTv5 if self._endpoint.version == "5" else paho.MQTTv311
        clean = None if self._endpoint.version == "5" else True
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=protocol,
            clean_session=clean,
            reconnect_on_failure=False,
        )
        client.max_inflight_messages_set(WINDOW)
        client.connect_timeout = _PATIENCE_S
        user, password = self._endpoint.credentials()
        if user is not None:
            client.username_pw_set(user, password)
        if self._context is not None:
            client.tls_set_context(self._context)
        if self._will is not None:
            client.will_set(
                self._will.topic, self._will.payload, qos=1, retain=True, properties=self._will_properties()
            )
        return client

    def _will_properties(self) -> Properties | None:
        if self._endpoint.version != "5":
            return None
        properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]  # paho leaves it untyped
        properties.ContentType = "application/vnd.fedeq.v1+cbor"
        return properties

    # paho's callbacks, within a turn

    def _wire(self, session: _Session) -> None:
        client = session.client

        def on_connect(
            _c: paho.Client, _u: object, _f: object, code: ReasonCode, properties: Properties | None
        ) -> None:
            if code.is_failure:
                remedy = '; set version = "3.1.1" for [broker]' if "protocol version" in str(code) else ""
                self._end(session, f"refused us: {code}{remedy}")
                return
            with self._changed:
                session.packet_limit = getattr(properties, "MaximumPacketSize", None)
            client.subscribe([(pattern, 1) for pattern in self._subscriptions])

        def on_subscribe(_c: paho.Client, _u: object, _mid: int, codes: list[ReasonCode], _p: object) -> None:
            if any(code.is_failure for code in codes):
                self._end(session, f"refused a subscription: {', '.join(map(str, codes))}")
                return
            with self._changed:
                session.subscribed = True
                self._changed.notify_all()
            self._on_event(Connected(session.packet_limit))

        def on_publish(_c: paho.Client, _u: object, _mid: int, code: ReasonCode, _p: object) -> None:
            if code.is_failure:
                log.error("the broker refused a message", extra={"reason": str(code), "client": self._client_id})
            with self._changed:
                session.in_flight -= 1
                session.carried += 1
                self._changed.notify_all()

        def on_message(_c: paho.Client, _u: object, message: paho.MQTTMessage) -> None:
            payload = bytes(message.payload)
            with self._changed:
                self._down += packet_bytes(message.topic, payload, self._endpoint.version)
                self._up += _PUBACK_BYTES
            # amqtt 0.11 sends a newcomer every retained message that anybody has subscribed to
            topic = message.topic
            if topic in self._subscriptions or any(matches(pattern, topic) for pattern in self._subscriptions):
                self._on_event(Arrived(topic, payload))

        def on_disconnect(
            _c: paho.Client, _u: object, flags: paho.DisconnectFlags, code: ReasonCode, _p: object
        ) -> None:
            with self._changed:
                session.dismissed = flags.is_disconnect_packet_from_server
            self._end(session, f"closed the connection: {code}")

        client.on_connect = on_connect
        client.on_subscribe = on_subscribe
        client.on_publish = on_publish
        client.on_message = on_message
        client.on_disconnect = on_disconnect
        client.on_socket_open = _disable_nagle

    def _end(self, session: _Session, what: str) -> None:
        with self._changed:
            session.reason = session.reason or f"broker {self._host}:{self._port} {what}"
            session.over = True
            self._changed.notify_all()
        self._wake()  # whoever publishes may be the first to find that the connection is gone


def _disable_nagle(_client: paho.Client, _userdata: object, opened: Any) -> None:
    if isinstance(opened, socket.socket) and opened.family in (socket.AF_INET, socket.AF_INET6):
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _hung_up(link: Any) -> bool:
    """Whether the other side has closed: what it said last must be read before a failing write closes our side, too."""
    if link is None or link.fileno() < 0:
        return True
    poller = select.poll()
    poller.register(link, select.POLLRDHUP)
    return bool(poller.poll(0))
