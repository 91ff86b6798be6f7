"""What a device is told to do, and what it says of itself: the messages of `POST /v1/report`, both ways.

A device asks, nobody calls it: boards sit behind routers that let nothing in. So an action waits on the host until the
device reports, and every action expires, because one that waits for ever is obeyed when nobody remembers it.
"""

from typing import Annotated, Literal

import msgspec

Kind = Literal["update", "rollback", "logs"]
Progress = Literal["running", "done", "failed", "rolled_back", "expired"]

# A report is kept on the host and shown in a terminal: bounded, whatever a device sends.
_Line = Annotated[str, msgspec.Meta(max_length=256)]
_Text = Annotated[str, msgspec.Meta(max_length=8192)]
_Log = Annotated[str, msgspec.Meta(max_length=32_768)]


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One order to one device.

    version: of the release or model it is about ("" for logs). target: of an update, its path in the TUF repository,
    which says with the operator's signature what it is. expires: unix seconds.
    """

    id: str
    kind: Kind
    version: str
    expires: int
    target: str = ""


class ActionState(msgspec.Struct, frozen=True, kw_only=True):
    """How far a device has come with an action. detail: the reason, or the log lines asked for."""

    id: _Line
    state: Progress
    detail: _Log = ""

    @property
    def ended(self) -> bool:
        """Whether the device will do no more about it."""
        return self.state != "running"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a device says of itself.

    version: of the release that runs. confirmed: whether it is more than a trial. previous: what a rollback goes back
    to ("" where there is none). healthy: the last solve converged. boot_id: of the kernel, new with every boot.
    """

    version: _Line
    confirmed: bool
    previous: _Line = ""
    healthy: bool
    boot_id: _Line = ""
    last_error: _Text = ""
    action: ActionState | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What the host answers: the action that is due, if any, and where its service is from now on ("": as before)."""

    action: Action | None
    service: str = ""
