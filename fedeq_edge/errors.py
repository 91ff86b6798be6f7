"""Every error that fedeq-edge raises on purpose, as one tree.

    FedEqError
    ├── ConfigError            a setting, a file or an option of the user's
    ├── DataError              a data set that cannot be used as it is
    ├── WireError              bytes that do not follow the protocol
    │   ├── LocalWireError     we were about to send them
    │   └── RemoteWireError    somebody sent them to us
    ├── TransportError         broker refused, unreachable, or packet over its limit
    ├── ContributionError      a contribution that the aggregator refuses; `code` names the reason
    ├── MaskingError           a masked sum that cannot go on: too few devices, or shares that do not fit
    ├── SolverError            a solve asked to raise (`throw=True`); a gradient that is not finite
    ├── ProvisionError         a board that could not be provisioned, flashed or updated; `exit` says how it ended
    ├── ExportError            a model that could not be exported, or failed its check
    └── StateError             a state folder that is damaged, locked or of another federation

The message of each says what, where, and what to change, in one line: command-line shells print it as it is.
Anything else that surfaces is a defect of ours and keeps its traceback.
"""

import enum


class Exit(enum.IntEnum):
    """How a flash, an update or the installer on a board (provision/release.py) ended; the exit status of each."""

    OK = 0
    FAILED = 1
    MISUSED = 2
    VERIFICATION = 3  # tampered with, or not signed by the fleet's key
    ROLLED_BACK = 4  # unhealthy: the board runs what it ran before
    NO_SPACE = 5
    WRONG_PLATFORM = 6  # architecture, python or glibc do not fit, or the CPU would crash
    HOST_KEY = 7  # unknown or changed
    LOST = 8  # unreachable, or gone half-way
    TOKEN_EXPIRED = 9
    TOKEN_USED = 10
    CLOCK = 11
    BOOTED_CARD = 12
    BUSY = 13  # another installer is at work
    ACTION_EXPIRED = 14
    OTHER_DEVICE = 15  # the board, or the mounted root, is a device of another name


class FedEqError(Exception):
    """Base of all errors raised on purpose; its text is a complete sentence for the user."""


class ConfigError(FedEqError):
    """A setting, file or option cannot be used."""


class DataError(FedEqError):
    """A data set cannot be used."""


class WireError(FedEqError):
    """Bytes do not follow the protocol."""


class LocalWireError(WireError):
    """We were asked to send something that the protocol forbids."""


class RemoteWireError(WireError):
    """Somebody sent us something that the protocol forbids."""


class TransportError(FedEqError):
    """The broker cannot be reached, refuses us, or would refuse a packet."""


class ContributionError(FedEqError):
    """A contribution is refused. `code` is the machine-readable reason, the text names device and round."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class MaskingError(FedEqError):
    """A masked sum cannot go on; nothing was unmasked that should not be, and a new session is needed.

    devices: whose fault it is, where that is known.
    """

    def __init__(self, message: str, devices: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.devices = devices


class SolverError(FedEqError):
    """A solve failed and the caller asked for an exception, or a loss or gradient is not finite."""


class ProvisionError(FedEqError):
    """A board was not provisioned, flashed or updated, and runs what it ran before."""

    def __init__(self, exit: Exit, message: str) -> None:  # noqa: A002  # the word of the command line
        super().__init__(message)
        self.exit = exit


class ExportError(FedEqError):
    """A model could not be exported, or the exported file failed its check."""


class StateError(FedEqError):
    """A state folder is damaged, locked by another process, or belongs to another federation."""
