"""Every decoder of bytes from the network under a coverage-guided fuzzer: make fuzz (FUZZ_S=60).

A decoder may refuse with the error that is its word for that, and nothing else may come out of it: no other exception,
no allocation beyond what a payload of the protocol needs (libFuzzer's limit of memory), no endless loop. A find is
written to a file crash-...; give that file as an argument to see it again.
"""

import contextlib
import importlib
import resource
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

atheris: Any = importlib.import_module("atheris")  # without types, and only group "fuzz" installs it

with atheris.instrument_imports():
    from fedeq_edge import masking
    from fedeq_edge.errors import ConfigError, RemoteWireError
    from fedeq_edge.masking import messages as steps
    from fedeq_edge.wire import chunks, coding, messages
    from fedeq_edge.wire.topics import Topics

CODECS = ("f32", "f16", "int8", "int4", "int2", "int8+z", "int2+z", "top5:int8", "top5:int4+z", "top49.9:int2", "f32+z")
LENGTH = 1000
LARGEST_EXTRA_BYTES = 200 * 2**20
TOPICS = Topics("f")


def message(data: Any) -> None:
    """A payload, and what it carries."""
    received = messages.decode(data.ConsumeBytes(2**16))
    if isinstance(received.message, messages.Contribution | messages.Model):
        coding.decode(received.message.codec, received.body, min(received.message.length, LENGTH))


def framed(data: Any) -> None:
    """A header that the frame's checksum covers, so that the fuzzer comes past it."""
    kind = data.ConsumeIntInRange(0, 20)
    header = data.ConsumeBytes(8192)
    payload = _frame(kind, header, data.ConsumeBytes(256))
    messages.decode(payload)


def _frame(kind: int, header: bytes, body: bytes) -> bytes:
    fixed = struct.pack("<4sBBHI", b"FDQ1", kind, 0, len(header), len(body))
    return fixed + struct.pack("<I", zlib.crc32(header, zlib.crc32(fixed))) + header + body


def vector(data: Any) -> None:
    """A coded vector; what decodes has the length that was asked for and holds numbers."""
    codec = data.PickValueInList(list(CODECS))
    found = coding.decode(codec, data.ConsumeBytes(coding.largest_bytes(codec, LENGTH) + 8), LENGTH)
    assert found.size == LENGTH
    assert abs(found).max() < float("inf")


def codec_name(data: Any) -> None:
    """The text of a codec."""
    coding.parse(data.ConsumeUnicodeNoSurrogates(20))


def transfer(data: Any) -> None:
    """Blocks of a blob."""
    incoming = chunks.Incoming(bytes(32), data.ConsumeIntInRange(1, 10 * chunks.BLOCK_BYTES))
    for _ in range(4):
        with contextlib.suppress(RemoteWireError):
            incoming.add(data.ConsumeInt(4), data.ConsumeBytes(chunks.BLOCK_BYTES))
    outgoing = chunks.Outgoing(bytes(5 * chunks.BLOCK_BYTES), chunks.Link())
    outgoing.acknowledge(data.ConsumeBytes(4), 0.0)


def masked(data: Any) -> None:
    """A step of a masked round."""
    kind = data.PickValueInList([steps.Keys, steps.Roster, steps.Shares, steps.Delivery, steps.Masked, steps.Reveal])
    masking.decode(data.ConsumeBytes(4096), kind)


def topic(data: Any) -> None:
    """A topic that a broker delivered."""
    found = TOPICS.device_of(data.ConsumeUnicodeNoSurrogates(100))
    assert found is None or "/" not in found[0]


TARGETS: tuple[Callable[[Any], None], ...] = (message, framed, vector, codec_name, transfer, masked, topic)


def one_input(raw: bytes) -> None:
    """One try."""
    data = atheris.FuzzedDataProvider(raw)
    with contextlib.suppress(RemoteWireError, ConfigError):
        data.PickValueInList(list(TARGETS))(data)


def main() -> None:
    """Fuzz until libFuzzer's own options say stop (-max_total_time=SECONDS)."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    atheris.Setup([*sys.argv, f"-rss_limit_mb={used + LARGEST_EXTRA_BYTES // 2**20}"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
