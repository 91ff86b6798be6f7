"""What a Flower message carries: frames of our protocol, one after the other in one array of bytes.

A frame is a message of wire/messages.py, which is decoded strictly and never by pickle. Each has its length before it,
4 bytes, little endian. One array, because Flower describes and digests every one of them: 150 bytes each.
"""

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

import struct
from collections.abc import Sequence
from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.wire.topics import check_identifier

RECORD: Final = "fedeq-edge"
_FRAMES: Final = "frames"
_NAME: Final = "device"
_STYPE: Final = "fedeq-edge/1"  # how Flower names the serialisation of an array
_LENGTH: Final = struct.Struct("<I")


def pack(frames: Sequence[bytes]) -> RecordDict:
    """The content of a Flower message that carries these encoded messages in order."""
    return RecordDict({RECORD: ArrayRecord({_FRAMES: array(b"".join(map(_prefixed, frames)))})})


def named(content: RecordDict, device: str) -> RecordDict:
    """The same content, which also says what its sender is called."""
    content[_NAME] = ConfigRecord({_NAME: device})
    return content


def name_in(content: RecordDict) -> str:
    """What the sender is called. Raises ConfigError where it says nothing, or nothing that can be a device's id."""
    record = content.config_records.get(_NAME)
    return check_identifier(str(None if record is None else record.get(_NAME)), "device")


def array(data: bytes) -> Array:
    """Bytes as Flower stores and sends them."""
    return Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)


def unpack(content: RecordDict, limit_bytes: int) -> list[bytes]:
    """The frames in it. Raises RemoteWireError where there are none of ours, or they have more than `limit_bytes`."""
    record = content.array_records.get(RECORD)
    held = None if record is None else record.get(_FRAMES)
    if held is None or held.stype != _STYPE:
        raise RemoteWireError(
            f'content holds no "{RECORD}" array of {_STYPE}; do both apps come from fedeq_edge.flower?'
        )
    if len(held.data) > limit_bytes:
        raise RemoteWireError(f"content has {len(held.data)} bytes, at most {limit_bytes} are taken")
    return _split(held.data)


def _prefixed(frame: bytes) -> bytes:
    return _LENGTH.pack(len(frame)) + frame


def _split(data: bytes) -> list[bytes]:
    frames: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + _LENGTH.size
        if start > len(data):
            raise RemoteWireError(f"content of {len(data)} bytes ends inside a length")
        end = start + int(_LENGTH.unpack_from(data, at)[0])
        if end > len(data):
            raise RemoteWireError(f"content of {len(data)} bytes ends inside a frame of {end - start}")
        frames.append(data[start:end])
        at = end
    return frames
