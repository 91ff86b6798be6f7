"""`fedeq flash`: from a bundle and a target to the device's first heartbeat, the same steps for every target.

Theory of operation. `prepare` looks and changes nothing: the bundle is verified, the board says what it is, what would
not run is refused, and the plan says what will be done. `flash` does it. A board that runs gets the release unpacked
without a start, then its certificate (a key that it makes itself, a request that comes over the channel whose host key
was checked), then the start, which is the health check. A card gets the same files and a join token, and its first
boot does the rest (first_boot.py). Every step may be repeated; one that finds its work done does nothing.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.bundle import verify
from fedeq_edge.provision.facts import Facts
from fedeq_edge.provision.flash_board import BoardWay
from fedeq_edge.provision.flash_card import ImageWay, RootfsWay, booted
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.plan import Flashed, Plan, Sign, Steps, Told, Way
from fedeq_edge.provision.preflight import Finding, check
from fedeq_edge.provision.targets import AnyTarget
from fedeq_edge.provision.targets.image import ImageTarget
from fedeq_edge.provision.targets.rootfs import RootfsTarget


def prepare(target: AnyTarget, fleet: Fleet, device: str, bundle: Path, *, data: Path | None = None) -> Plan:
    """What flashing this bundle would do; nothing is changed.

    data: npz in the place of what the device has. Raises ProvisionError where it would be refused, with the exit that
    `flash` would end with.
    """
    fleet.check_admitted(device)
    known = fleet.device(device)
    manifest = verify(bundle, fleet.folder / "keys/bundle.pub")
    if manifest.profile != known.profile:
        raise ProvisionError(
            Exit.WRONG_PLATFORM,
            f"bundle {bundle.name} is for {manifest.profile} and device {device} is a {known.profile}; "
            f"fedeq bundle build --device {device}",
        )
    facts = target.facts()
    findings = check(facts, manifest)
    _refuse(target, facts, findings)
    with bundle.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    plan = Plan(
        device=device,
        target=target.name,
        bundle=bundle,
        digest=digest,
        manifest=manifest,
        facts=facts,
        warnings=[finding.line() for finding in findings],
        intended=[],
        data=data,
    )
    way = _way(target, fleet, plan)
    return msgspec.structs.replace(plan, intended=way.intended(), occupant=way.occupant)


def _refuse(target: AnyTarget, facts: Facts, findings: Sequence[Finding]) -> None:
    if isinstance(target, ImageTarget) and facts.booted:
        raise booted(target.name)
    wrong = next((finding for finding in findings if finding.severity == "refuse"), None)
    if wrong is not None:
        raise ProvisionError(wrong.code, f"{target.name.removesuffix(':')}: {wrong.line()}")


def flash(target: AnyTarget, fleet: Fleet, plan: Plan, *, sign: Sign, told: Told = lambda _: None) -> Flashed:
    """The device runs the bundle and was seen connected to its broker; a card will at its first boot.

    sign: opens the fleet's CA. told: hears of every step. Raises ProvisionError: the device runs what it ran before,
    except where the text says that the new release runs and its broker does not answer.
    """
    steps = Steps(told)
    way = _way(target, fleet, plan)
    changed = way.go(steps, sign)
    fleet.flashed(plan.device, plan.target)
    return Flashed(
        device=plan.device,
        target=plan.target,
        version=plan.manifest.version,
        changed=changed,
        heartbeat_s=None if isinstance(target, ImageTarget | RootfsTarget) else steps.seconds,
        steps=steps.done,
    )


def _way(target: AnyTarget, fleet: Fleet, plan: Plan) -> Way:
    if isinstance(target, ImageTarget):
        return ImageWay(target, fleet, plan)
    if isinstance(target, RootfsTarget):
        return RootfsWay(target, fleet, plan)
    return BoardWay(target, fleet, plan)
