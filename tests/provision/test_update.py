"""Updates over the air, with real TLS, real TUF, real release.py: what boards take, refuse, and survive."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fedeq_edge.errors import ConfigError, Exit, ProvisionError, StateError
from fedeq_edge.provision import link, update
from fedeq_edge.provision.ca import DEVICE_LIFETIME
from fedeq_edge.provision.reporting import Board
from fedeq_edge.provision.repository import Repository, board_files, freshen
from fedeq_edge.provision.update import publish
from fedeq_edge.provision.updater import Updater
from tests.provision.small_models import personal
from tests.provision.update_fleet import DAY_S, HOUR_S, NOW, Killed, Member, Plant, said, tell

OWN = "pi-01"


def replace_action(plant: Plant, device: str, **changes: object) -> None:
    """Somebody who holds the service, and no key, changes what the device is told."""
    path = plant.fleet.folder / "actions" / f"{device}.json"
    found = json.loads(path.read_text())
    found["action"].update(changes)
    path.write_text(json.dumps(found))


def test_a_board_installs_what_it_is_told_and_says_so(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    member.turn()
    assert member.runs == "1.1+b"
    assert (said(plant, OWN).state, said(plant, OWN).detail) == ("done", "runs 1.1+b")
    heard = plant.fleet.heard(OWN)
    assert heard is not None
    assert (heard.report.version, heard.report.confirmed, heard.report.previous) == ("1.1+b", True, "1.0+a")
    assert heard.report.healthy
    assert heard.report.boot_id
    assert not (member.board.folder / "download").exists()


def test_a_release_that_is_unhealthy_is_left_again_and_its_last_lines_come_back(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b", "broken"))
    member.turn()
    assert member.runs == "1.0+a"
    assert said(plant, OWN).state == "rolled_back"
    assert said(plant, OWN).detail.endswith("Illegal instruction")
    heard = plant.fleet.heard(OWN)
    assert heard is not None
    assert heard.report.last_error == "Illegal instruction"


def test_a_target_with_another_byte_is_refused(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    (stored,) = [path for path in (plant.tuf / "targets").rglob("*1.1+b*") if path.is_file()]
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "failed")
    assert "is not what the fleet signed" in said(plant, OWN).detail
    stored.write_bytes(bytes(content) + bytes(100))
    tell(plant, OWN, plant.bundle("1.2+c"))
    (stored,) = [path for path in (plant.tuf / "targets").rglob("*1.2+c*") if path.is_file()]
    stored.write_bytes(stored.read_bytes() + bytes(100))
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "failed")
    assert "longer than the fleet signed" in said(plant, OWN).detail


@pytest.mark.parametrize("role", ["timestamp", "2.snapshot", "2.targets"])
def test_metadata_that_nobody_of_the_fleet_signed_is_refused(plant: Plant, member: Member, role: str) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    path = plant.tuf / "metadata" / f"{role}.json"
    found = json.loads(path.read_text())
    found["signed"]["x-fedeq-issued"] += 1
    path.write_text(json.dumps(found))
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "failed")
    assert "is not what the fleet signed" in said(plant, OWN).detail


def test_older_metadata_is_refused_by_a_board_that_has_seen_newer(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    shutil.copytree(plant.tuf, plant.folder / "old")
    member.turn()
    tell(plant, OWN, plant.bundle("1.2+c"))
    member.turn()
    shutil.rmtree(plant.tuf)
    (plant.folder / "old").rename(plant.tuf)
    plant.fleet.give_action(OWN, "update", "1.1+b", HOUR_S, target="releases/x86-64/1.1+b.tar.gz")
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.2+c", "failed")
    assert "is not what the fleet signed" in said(plant, OWN).detail


def test_an_older_release_that_is_still_published_is_refused(plant: Plant, member: Member) -> None:
    plant.fleet.add("pi-02", "x86-64")
    _, older = tell(plant, "pi-02", plant.bundle("1.1+b"))  # pi-02 sleeps, and its action keeps it published
    tell(plant, OWN, plant.bundle("1.2+c"))
    member.turn()
    plant.fleet.give_action(OWN, "update", "1.1+b", HOUR_S, target=older.path)
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.2+c", "failed")
    assert "older than what this board had" in said(plant, OWN).detail


def test_the_operator_may_publish_an_old_bundle_again(plant: Plant, member: Member) -> None:
    for version in ("1.1+b", "1.2+c", "1.1+b"):
        tell(plant, OWN, plant.bundle(version))
        member.turn()
        assert member.runs == version


def test_a_target_that_is_not_what_the_action_says_is_refused(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    replace_action(plant, OWN, version="9.9+f")
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "failed")
    assert "is 1.1+b, not 9.9+f" in said(plant, OWN).detail


@pytest.mark.parametrize("year", ["1970", "right"])
def test_metadata_that_has_expired_is_refused_whatever_the_clock_says(plant: Plant, member: Member, year: str) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    member.turn()  # the board has seen what was signed on the first day
    frozen = (plant.tuf / "metadata" / "timestamp.json").read_bytes()
    plant.clock.now += 20 * DAY_S
    tell(plant, OWN, plant.bundle("1.2+c"))
    member.clock.now = 0.0 if year == "1970" else plant.clock.now
    if year == "1970":
        member.turn()  # it learns the time from signed metadata
        tell(plant, OWN, plant.bundle("1.3+d"))
        shutil.rmtree(member.board.folder / "metadata")  # and keeps it, though all else is lost
    (plant.tuf / "metadata" / "timestamp.json").write_bytes(frozen)
    plant.clock.now = NOW + DAY_S  # so that the service does not sign anew: it is not ours any more
    runs = member.runs
    member.turn()
    assert (member.runs, said(plant, OWN).state) == (runs, "failed")
    assert "expired" in said(plant, OWN).detail


def test_the_service_signs_anew_that_nothing_is_kept_back(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    plant.clock.now = member.clock.now = NOW + 300 * DAY_S
    plant.fleet.give_action(OWN, "update", "1.1+b", HOUR_S, target="releases/x86-64/1.1+b.tar.gz")
    with member.environment():
        assert Updater(member.board, member.clock).renew()
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.1+b", "done")


def test_a_board_without_a_clock_updates(plant: Plant, member: Member) -> None:
    member.clock.now = 0.0
    tell(plant, OWN, plant.bundle("1.1+b"))
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.1+b", "done")


def test_an_action_that_has_expired_is_not_obeyed(plant: Plant, member: Member) -> None:
    action, _ = tell(plant, OWN, plant.bundle("1.1+b"))
    member.clock.now = action.expires
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "expired")


def test_the_newest_action_replaces_one_that_has_not_begun(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    with pytest.raises(Killed):
        member.turn(die_at=3)
    assert member.task.state == "running"
    tell(plant, OWN, plant.bundle("1.2+c"))
    member.turn()
    assert (member.runs, said(plant, OWN).detail) == ("1.2+c", "runs 1.2+c")


def test_an_action_that_is_withdrawn_before_it_began_is_dropped(plant: Plant, member: Member) -> None:
    action, _ = tell(plant, OWN, plant.bundle("1.1+b"))

    def meanwhile(step: str) -> None:
        if step == "keep":
            plant.fleet.withdraw(action, OWN)

    member.turn(meanwhile=meanwhile)
    assert (member.runs, member.task.state) == ("1.0+a", "expired")


def test_an_action_is_done_once_however_often_the_board_asks(plant: Plant, member: Member) -> None:
    for version in ("1.1+b", "1.2+c"):
        tell(plant, OWN, plant.bundle(version))
        member.turn()
    plant.fleet.give_action(OWN, "rollback", "", HOUR_S)
    for _ in range(3):
        member.turn()
    assert (member.runs, said(plant, OWN).detail) == ("1.1+b", "runs 1.1+b")


def test_a_rollback_needs_nothing_but_the_word(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    member.turn()
    shutil.rmtree(plant.tuf)
    plant.fleet.give_action(OWN, "rollback", "", HOUR_S)
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "done")
    plant.fleet.give_action(OWN, "rollback", "", HOUR_S)
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "failed")
    assert "no earlier release" in said(plant, OWN).detail


def test_the_logs_of_a_board_come_with_its_report(plant: Plant, member: Member) -> None:
    (member.fake.scripts / "log").write_text("round 1\nround 2\n")
    member.turn()
    lines = update.logs(plant.fleet, OWN, 60.0, wait=lambda _: member.turn())
    assert lines == ["round 1", "round 2"]


def test_a_board_that_does_not_answer_is_named_with_its_last_word(plant: Plant, member: Member) -> None:
    member.turn()
    with pytest.raises(ProvisionError, match=r"within 1 s .last heard 20") as refused:
        update.logs(plant.fleet, OWN, 1.0, wait=lambda _: None)
    assert refused.value.exit is Exit.ACTION_EXPIRED
    member.turn()
    assert member.runs == "1.0+a"
    assert plant.fleet.action_for(OWN) is None  # it was taken back


def test_a_board_without_an_earlier_release_is_not_asked_to_go_back(plant: Plant, member: Member) -> None:
    member.turn()
    with pytest.raises(ProvisionError, match=r"runs 1\.0\+a and has no earlier release") as refused:
        update.roll_back(plant.fleet, OWN, 60.0, wait=lambda _: None)
    assert refused.value.exit is Exit.FAILED
    assert plant.fleet.given_action(OWN) is None


def test_a_model_comes_without_an_update_of_the_agent(plant: Plant, member: Member) -> None:
    for seed in (0, 1):
        model = personal(plant.folder / "personal.fedeq", seed)
        tell(plant, OWN, model)
        member.fake.calls()
        member.turn()
        assert (member.board.models / "personal.fedeq").read_bytes() == model.read_bytes()
        assert not [call for call in member.fake.calls() if "restart" in call]
    assert (member.board.models / "personal.fedeq").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in member.board.models.iterdir()] == ["personal.fedeq"]


def test_a_model_that_cannot_be_loaded_is_not_published(plant: Plant, tmp_path: Path) -> None:
    whole = personal(tmp_path / "personal.fedeq").read_bytes()
    for name, content in (("junk.onnx", b"graph"), ("junk.fedeq", b"weights"), ("cut.fedeq", whole[:-1])):
        model = tmp_path / name
        model.write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} cannot be loaded, so that no board gets it") as refused:
            publish(plant.fleet, model, clock=plant.clock)
        assert "\n" not in str(refused.value)
    assert not [path for path in (plant.tuf / "targets").rglob("*") if path.is_file()]


def test_an_agent_cannot_lead_the_updater_out_of_its_folder_by_a_link(plant: Plant, member: Member) -> None:
    model = personal(plant.folder / "personal.fedeq")
    victim = plant.folder / "victim"
    victim.write_bytes(b"mine")
    member.board.models.mkdir(parents=True)
    (member.board.models / ".personal.fedeq.part").symlink_to(victim)
    tell(plant, OWN, model)
    member.turn()
    assert (said(plant, OWN).state, victim.read_bytes()) == ("done", b"mine")
    shutil.rmtree(member.board.models)
    member.board.models.symlink_to(plant.folder)
    tell(plant, OWN, model)
    model.unlink()
    member.turn()
    assert said(plant, OWN).state == "failed"
    assert not model.exists()


def test_a_thief_of_the_services_key_cannot_send_a_board_into_the_future(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    freshen(plant.tuf, lambda: NOW + 3000 * DAY_S)
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "failed")
    for name in ("timestamp.json", "3.snapshot.json"):
        (plant.tuf / "metadata" / name).unlink()
    shutil.rmtree(member.board.folder / "metadata")  # its versions are the thief's; what it has seen stays
    plant.clock.now = member.clock.now = NOW + DAY_S
    tell(plant, OWN, plant.bundle("1.1+b"))
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.1+b", "done")


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    plant: Plant, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    usage = shutil.disk_usage(member.board.home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    member.turn()
    assert said(plant, OWN).state == "failed"
    assert "MB free for a download" in said(plant, OWN).detail


def test_a_network_that_breaks_off_leaves_the_task_for_the_next_turn(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    settings = member.board.identity / "updater.toml"
    good = settings.read_bytes()
    stored = next(path for path in (plant.tuf / "targets").rglob("*1.1+b*") if path.is_file())
    content = stored.read_bytes()

    def cut(step: str) -> None:
        if step == "download":
            os.truncate(stored, 0)
            stored.unlink()
            stored.symlink_to("/nowhere")

    member.turn(meanwhile=cut)
    assert said(plant, OWN).state == "failed"  # the service says that it has no such file
    stored.unlink()
    stored.write_bytes(content)
    tell(plant, OWN, plant.bundle("1.1+b"))
    settings.write_bytes(b'service = "https://127.0.0.1:1"\n')
    with pytest.raises(ProvisionError) as lost:
        member.turn()
    assert lost.value.exit is Exit.LOST
    settings.write_bytes(good)
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.1+b", "done")


def test_files_of_the_repository_are_for_devices_alone(plant: Plant, member: Member) -> None:
    nobody = link.trusting((member.board.identity / "ca.crt").read_bytes())
    with pytest.raises(ProvisionError, match="is for devices") as refused:
        link.ask(plant.url, nobody, "GET", "/tuf/metadata/timestamp.json")
    assert refused.value.exit is Exit.VERIFICATION
    plant.fleet.revoke(OWN)
    with pytest.raises(ProvisionError, match="was revoked"):
        link.ask(plant.url, link.identified(member.board.identity), "GET", "/tuf/metadata/timestamp.json")


def test_what_flash_puts_on_a_board_is_what_enrolment_brings(plant: Plant, member: Member) -> None:
    files = board_files(plant.fleet)
    assert (member.board.identity / "root.json").read_bytes() == files["root.json"]
    assert files["updater.toml"].startswith(b"service = ")


def test_a_board_that_is_not_enrolled_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="fedeq device enrol"):
        Updater(Board(tmp_path))


def test_the_keys_that_say_what_is_a_release_have_the_passphrase_of_the_authority(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "tuf", "secret", lambda: NOW)
    for name in ("root", "targets", "snapshot", "timestamp"):
        key = tmp_path / "tuf" / "keys" / name
        assert key.stat().st_mode & 0o777 == 0o600
        assert (b"ENCRYPTED" in key.read_bytes()) == (name in ("root", "targets"))
    freshen(tmp_path / "tuf", lambda: NOW + 5 * DAY_S)
    model = tmp_path / "m.onnx"
    model.write_bytes(b"graph")
    with pytest.raises(ProvisionError, match="FEDEQ_CA_PASSPHRASE"):
        Repository(tmp_path / "tuf", None, lambda: NOW).publish(model, tmp_path)
    assert repository.publish(model, tmp_path).path == "models/m.onnx"
    with pytest.raises(StateError, match="nothing makes its keys anew"):
        Repository.create(tmp_path / "tuf")


# Renewal


def test_the_agent_is_restarted_with_a_certificate_that_was_renewed(plant: Plant, member: Member) -> None:
    updater = Updater(member.board, member.clock)
    with member.environment():
        member.fake.calls()
        assert not updater.renew()
        assert not member.fake.calls()
        plant.clock.now = member.clock.now = NOW + DEVICE_LIFETIME.total_seconds() / 2 + 60
        assert updater.renew()
        assert member.fake.calls() == ["restart fedeq-agent.service"]


def test_a_renewal_that_dies_before_the_restart_is_made_good(plant: Plant, member: Member) -> None:
    plant.clock.now = member.clock.now = NOW + DEVICE_LIFETIME.total_seconds() / 2 + 60

    def told(step: str) -> None:
        if step == "restart":
            raise Killed

    with member.environment():
        with pytest.raises(Killed):
            Updater(member.board, member.clock, told).renew()
        member.fake.calls()
        assert not Updater(member.board, member.clock).renew()
        assert member.fake.calls() == ["restart fedeq-agent.service"]
