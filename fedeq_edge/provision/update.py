"""On the host: a release or a model to many devices, in waves; the logs and the rollback of one.

Theory of operation. Devices ask, nobody calls them: an action is laid out, and each report says how far it is. First
come the canaries; each further wave is twice as large as the one before, begins when that has ended, and does not begin
once more than `max_failures` devices have failed. A device that says nothing until the timeout has failed, too.
Whatever happens, Ctrl-C included, no action is left behind that a device might find when nobody expects it.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedeq_edge.atomic import locked
from fedeq_edge.errors import ConfigError, Exit, ProvisionError, StateError
from fedeq_edge.provision.actions import Action, ActionState, Kind, Progress
from fedeq_edge.provision.archive import read_manifest
from fedeq_edge.provision.fleet import Fleet, Heard
from fedeq_edge.provision.models import SUFFIXES, check_model
from fedeq_edge.provision.repository import Published, Repository

_LOOK_S: Final = 0.5  # between two looks at what devices have said
Clock = Callable[[], float]
Wait = Callable[[float], None]
Told = Callable[[str], None]
# silent: no end of it was heard in time. replaced: somebody told the device something else. untold: never told.
State = Progress | Literal["silent", "replaced", "untold"]
_FAILED: Final = ("failed", "rolled_back", "expired", "silent", "replaced")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How it went with one device, and in which wave, counted from 1 (0: none). detail: why, or the last log lines."""

    state: State
    wave: int
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether it counts against `max_failures`."""
        return self.state in _FAILED


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """How it went with all devices. interrupted: by Ctrl-C."""

    version: str
    devices: dict[str, Outcome]
    interrupted: bool = False

    @property
    def failures(self) -> int:
        """Devices that failed."""
        return sum(outcome.failed for outcome in self.devices.values())

    @property
    def exit(self) -> Exit:
        """4 where a device rolled back, else 14 where one did not answer in time, else 1 where one failed, else 0."""
        states = {outcome.state for outcome in self.devices.values()}
        if "rolled_back" in states:
            return Exit.ROLLED_BACK
        if states & {"silent", "expired"}:
            return Exit.ACTION_EXPIRED
        return Exit.FAILED if states & set(_FAILED) else Exit.OK


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How an update is rolled out. timeout_s: of each wave."""

    canary: int = 1
    max_failures: int = 0
    timeout_s: float = 900.0


def _silent(_line: str) -> None:
    """Tells nobody."""


def waves(devices: Sequence[str], canary: int) -> list[list[str]]:
    """The devices in their order, `canary` of them first, then twice as many each time."""
    found, begin, size = [], 0, canary
    while begin < len(devices):
        found.append(list(devices[begin : begin + size]))
        begin, size = begin + size, size * 2
    return found


def chosen(fleet: Fleet, file: Path, devices: Sequence[str]) -> list[str]:
    """The devices that bundle or model are for: those named, or all of its board where none is.

    Sorted, those that have never reported behind the others: a box that was not opened yet is nobody's canary.
    Those that were revoked are left out. Raises ProvisionError where a named one was, or is another board, ConfigError
    where nobody is left.
    """
    for device in devices:
        fleet.check_admitted(device)
    board = "" if file.suffix in SUFFIXES else read_manifest(file).profile
    members = [device for device, one in fleet.devices.items() if not one.revoked]
    known = {device: fleet.device(device).profile for device in devices or members}
    others = sorted(device for device, profile in known.items() if board not in ("", profile))
    if devices and others:
        raise ProvisionError(
            Exit.WRONG_PLATFORM,
            f"device {others[0]} is a {known[others[0]]} and the bundle is for {board}; build one for it: "
            f"fedeq bundle build --device {others[0]}",
        )
    left = sorted(known.keys() - set(others), key=lambda device: (fleet.heard(device) is None, device))
    if not left:
        raise ConfigError(
            f"fleet {fleet.settings.name} has no {board or 'device'}; fedeq fleet add ID --profile {board}"
        )
    return left


def publish(fleet: Fleet, file: Path, passphrase: str | None = None, clock: Clock = time.time) -> Published:
    """Devices may fetch the bundle or model, once they are told to; what another is still told to fetch stays.

    Raises ConfigError where it is a model that cannot be loaded here, ProvisionError on a bundle that is damaged.
    """
    if file.suffix in SUFFIXES:
        check_model(file)
    waiting = [fleet.action_for(device) for device in fleet.devices]
    keep = {action.target for action in waiting if action is not None}
    repository = Repository(fleet.folder / "tuf", passphrase, clock)
    return repository.publish(file, fleet.folder / "keys" / "bundle.pub", keep)


@contextlib.contextmanager
def alone(fleet: Fleet) -> Iterator[None]:
    """Nobody else updates this fleet: two at a time would withdraw each other's files and actions."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(fleet.folder / "updates"))
        except StateError as error:
            raise ProvisionError(
                Exit.BUSY, f"another fedeq update is at work in {fleet.folder}; wait for its end"
            ) from error
        yield


class _Way:
    """One rollout on its way."""

    def __init__(self, fleet: Fleet, published: Published, plan: Plan, wait: Wait, clock: Clock) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._fleet = fleet
        self._published = published
        self._plan = plan
        self._wait = wait
        self._clock = clock

    @property
    def has_failed(self) -> bool:
        """Whether more devices failed than may."""
        return sum(outcome.failed for outcome in self.outcomes.values()) > self._plan.max_failures

    def go(self, devices: Sequence[str], number: int) -> None:
        """The wave has ended, well or not; none of its actions is left."""
        actions: dict[str, Action] = {}
        try:
            for device in devices:
                actions[device] = self._give(device)
            self._follow(actions, number)
        finally:
            for device, action in actions.items():
                self._fleet.withdraw(action, device)
            self._look(actions, number)
            self._forget_untold(actions)

    def _give(self, device: str) -> Action:
        version, path = self._published.meant.version, self._published.path
        return self._fleet.give_action(device, "update", version, self._plan.timeout_s, target=path)

    def _follow(self, actions: Mapping[str, Action], number: int) -> None:
        deadline = self._clock() + self._plan.timeout_s
        while True:
            self._look(actions, number)
            if all(self.outcomes[device].state != "running" for device in actions) or self.has_failed:
                return
            if self._clock() >= deadline:
                break
            self._wait(_LOOK_S)
        for device in actions:
            if self.outcomes[device].state == "running":
                self.outcomes[device] = Outcome(state="silent", wave=number, detail=_last_word(self._fleet, device))

    def _forget_untold(self, actions: Mapping[str, Action]) -> None:
        """Those whose action was taken back in time; what has begun ends on the device."""
        for device in actions:
            given = self._fleet.given_action(device)
            if self.outcomes[device].state == "running" and given is not None and given.state is None:
                self.outcomes[device] = Outcome(state="untold", wave=0)

    def _look(self, actions: Mapping[str, Action], number: int) -> None:
        for device, action in actions.items():
            known = self.outcomes.get(device)
            if known is None or known.state == "running":
                self.outcomes[device] = _outcome(self._fleet, device, action, number)


def roll_out(
    fleet: Fleet,
    published: Published,
    devices: Sequence[str],
    plan: Plan,
    *,
    told: Told = _silent,
    wait: Wait = time.sleep,
    clock: Clock = time.monotonic,
) -> Rollout:
    """Wave after wave has it, until all have or too many failed. told: hears a line for each wave."""
    way = _Way(fleet, published, plan, wait, clock)
    interrupted = False
    try:
        for number, wave in enumerate(waves(devices, plan.canary), 1):
            told(f"wave {number}: {', '.join(wave)}")
            for device in wave:
                if fleet.heard(device) is None:
                    told(
                        f"{device} was never heard from: waiting {plan.timeout_s:g} s for it; Ctrl-C ends that, "
                        f"fedeq doctor {device} tells what is known of it"
                    )
            way.go(wave, number)
            if way.has_failed:
                break
    except KeyboardInterrupt:
        interrupted = True
    untold = {device: Outcome(state="untold", wave=0) for device in devices}
    return Rollout(version=published.meant.version, devices={**untold, **way.outcomes}, interrupted=interrupted)


def logs(fleet: Fleet, device: str, timeout_s: float, told: Told = _silent, wait: Wait = time.sleep) -> list[str]:
    """The last lines of the device's agent, asked for by way of the service. Raises ProvisionError where none came.

    At once (LOST, BUSY) where it has never reported, or is being updated.
    """
    return _asked(fleet, device, "logs", timeout_s, told, wait).detail.splitlines()


def roll_back(fleet: Fleet, device: str, timeout_s: float, told: Told = _silent, wait: Wait = time.sleep) -> str:
    """What the device says after it went back to the release before. Raises ProvisionError where it did not.

    At once (LOST, BUSY, FAILED) where it has never reported, is being updated, or has no earlier release.
    """
    said = check_heard(fleet, device).report
    if not said.previous:
        raise ProvisionError(
            Exit.FAILED,
            f"device {device} runs {said.version or 'nothing'} and has no earlier release to go back to; publish an "
            "older bundle: fedeq update",
        )
    return _asked(fleet, device, "rollback", timeout_s, told, wait).detail


def check_heard(fleet: Fleet, device: str) -> Heard:
    """What a member of the fleet reported last. Raises ProvisionError where it would be waited for in vain."""
    fleet.check_admitted(device)
    heard = fleet.heard(device)
    if heard is None:
        raise ProvisionError(
            Exit.LOST,
            f"device {device} was never heard from, and there is nobody to ask; has it been flashed and started? "
            f"fedeq doctor {device} tells what is known of it",
        )
    return heard


def check_free(fleet: Fleet, device: str) -> None:
    """No update of it is under way, whose place another order would take. Raises ProvisionError (BUSY)."""
    pending = fleet.action_for(device)
    if pending is not None and pending.kind == "update":
        raise ProvisionError(
            Exit.BUSY,
            f"device {device} is being updated to {pending.version}; wait for the end of fedeq update, or end that "
            "with Ctrl-C, and ask again",
        )


def _asked(fleet: Fleet, device: str, kind: Kind, timeout_s: float, told: Told, wait: Wait) -> ActionState:
    check_heard(fleet, device)
    check_free(fleet, device)
    told(f"asking {device} by way of the service; it reports once a minute")
    action = fleet.give_action(device, kind, "", timeout_s)
    try:
        for _ in itertools.takewhile(lambda looks: looks * _LOOK_S < timeout_s, itertools.count()):
            outcome = _outcome(fleet, device, action, 1)
            if outcome.state != "running":
                break
            wait(_LOOK_S)
    finally:
        fleet.withdraw(action, device)
    outcome = _outcome(fleet, device, action, 1)
    if outcome.state == "done":
        return ActionState(id=action.id, state="done", detail=outcome.detail)
    if outcome.state in ("running", "expired"):
        why = outcome.detail or _last_word(fleet, device)
        raise ProvisionError(
            Exit.ACTION_EXPIRED, f"device {device} did not do it within {timeout_s:g} s ({why}); is it on?"
        )
    raise ProvisionError(Exit.FAILED, f"device {device}: {outcome.detail or outcome.state}")


def _outcome(fleet: Fleet, device: str, action: Action, wave: int) -> Outcome:
    given = fleet.given_action(device)
    if given is None or given.action.id != action.id:
        return Outcome(state="replaced", wave=wave, detail="it was told something else meanwhile")
    if given.state is None:
        return Outcome(state="running", wave=wave)
    return Outcome(state=given.state.state, wave=wave, detail=given.state.detail)


def _last_word(fleet: Fleet, device: str) -> str:
    heard = fleet.heard(device)
    if heard is None:
        return "it has never reported; does its updater run?"
    return f"last heard {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(heard.at))}"
