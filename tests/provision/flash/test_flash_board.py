"""Flashing a board that runs, over a real ssh connection, with the real installer, CA and bundles."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision import flash_board
from fedeq_edge.provision.ca import Authority, common_name
from fedeq_edge.provision.flash import flash, prepare
from fedeq_edge.provision.flash_board import check_heartbeat, roll_back
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.plan import Flashed
from fedeq_edge.provision.targets.local import LocalTarget
from tests.provision.flash.board import DEVICE, Board, BundleMaker, Reach, Server

Sign = Callable[[], Authority]
Flash = Callable[[Path], Flashed]


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_board, "TRIAL_S", 0.0)


@pytest.fixture
def flash_it(reach: Reach, fleet: Fleet, sign: Sign) -> Flash:
    def go(bundle: Path) -> Flashed:
        target = reach()
        return flash(target, fleet, prepare(target, fleet, DEVICE, bundle), sign=sign)

    return go


def identity(board: Board) -> Path:
    return board.root / "etc/fedeq-edge"


def test_a_bare_board_ends_enrolled_and_connected(
    flash_it: Flash, make_bundle: BundleMaker, board: Board, fleet: Fleet, server: Server
) -> None:
    done = flash_it(make_bundle("1.0", whole=True))
    assert done.changed
    assert done.heartbeat_s is not None
    assert board.current() == "1.0"
    certificate = x509.load_pem_x509_certificate((identity(board) / "device.crt").read_bytes())
    assert common_name(certificate) == DEVICE
    assert (identity(board) / "device.key").stat().st_mode & 0o777 == 0o600
    assert identity(board).stat().st_mode & 0o777 == 0o700
    assert fleet.device(DEVICE).target == f"ssh://pi@127.0.0.1:{server.port}"
    assert [step.name for step in done.steps] == ["settings", "upload", "install", "enrol", "start", "heartbeat"]


def test_nothing_of_the_upload_is_left(flash_it: Flash, make_bundle: BundleMaker, board: Board) -> None:
    flash_it(make_bundle("1.0"))
    home = board.root / "opt/fedeq-edge"
    left = {path.name for path in home.iterdir()}
    assert left <= {"releases", "current", "state.json", "lock", "release.py", "bundle.pub"}


def test_the_same_bundle_again_changes_nothing_and_is_checked(flash_it: Flash, running: Path, board: Board) -> None:
    before, key = board.restarts(), (identity(board) / "device.key").read_bytes()
    done = flash_it(running)
    assert not done.changed
    assert [step.name for step in done.steps] == ["heartbeat"]
    assert board.restarts() == before
    assert (identity(board) / "device.key").read_bytes() == key


def test_another_release_keeps_identity_and_settings(
    running: Path, flash_it: Flash, make_bundle: BundleMaker, board: Board
) -> None:
    settings = identity(board) / "agent.toml"
    settings.write_text(settings.read_text().replace("data =", "trainer_idle_s = 5.0\ndata ="))
    before = {path.name: path.read_bytes() for path in identity(board).iterdir()}
    done = flash_it(make_bundle("2.0"))
    assert [step.name for step in done.steps] == ["upload", "install", "heartbeat"]
    assert board.current() == "2.0"
    assert {path.name: path.read_bytes() for path in identity(board).iterdir()} == before


def test_settings_of_another_broker_are_replaced_and_kept_beside(running: Path, flash_it: Flash, board: Board) -> None:
    settings, before = identity(board) / "agent.toml", board.restarts()
    old = settings.read_text().replace("gateway:8883", "elsewhere:8883")
    settings.write_text(old)
    assert flash_it(running).changed
    assert "gateway:8883" in settings.read_text()
    assert (identity(board) / "agent.toml.old").read_text() == old
    assert board.restarts() == before + 1


def test_a_release_that_does_not_start_is_rolled_back_with_its_last_words(
    running: Path, flash_it: Flash, make_bundle: BundleMaker, board: Board
) -> None:
    with pytest.raises(ProvisionError, match="SolverError: residual") as caught:
        flash_it(make_bundle("2.0", broken=True))
    assert caught.value.exit == Exit.ROLLED_BACK
    assert board.current() == "1.0"
    assert (board.home / "active").read_text().strip() == "active"


def test_a_broker_that_does_not_answer_is_said_and_the_release_stays(running: Path, reach: Reach, board: Board) -> None:
    (board.home / "broker").write_text("connection refused")
    (board.home / "journal").write_text("broker gateway:8883 refused\n")
    target = reach()
    target.run([str(board.home / "bin/systemctl"), "restart", "fedeq-agent.service"])
    with pytest.raises(ProvisionError, match="broker: connection refused") as caught:
        check_heartbeat(target, "1.0", seconds=0.3)
    assert caught.value.exit == Exit.FAILED
    assert "gateway:8883 refused" in str(caught.value)
    assert board.current() == "1.0"


def test_the_status_of_an_agent_that_ran_before_is_no_heartbeat(running: Path, reach: Reach, board: Board) -> None:
    (board.home / "pid").write_text("999")
    with pytest.raises(ProvisionError, match="no word"):
        check_heartbeat(reach(), "1.0", seconds=0.3)


@pytest.mark.parametrize("word", ["bundle.tar.gz 644", "systemd-run", "device csr", "device.crt 644"])
def test_a_connection_that_goes_half_way_leaves_what_ran_and_the_next_flash_ends_it(
    word: str, flash_it: Flash, make_bundle: BundleMaker, board: Board
) -> None:
    board.drop = word
    bundle = make_bundle("1.0")
    with pytest.raises(ProvisionError) as caught:
        flash_it(bundle)
    assert caught.value.exit == Exit.LOST
    assert board.dropped.wait(30)
    assert board.restarts() == 0
    board.drop = ""
    assert flash_it(bundle).changed
    assert board.current() == "1.0"


def test_an_installation_goes_on_where_the_connection_went(
    running: Path, flash_it: Flash, make_bundle: BundleMaker, board: Board
) -> None:
    board.drop = "systemd-run"
    second = make_bundle("2.0")
    with pytest.raises(ProvisionError) as caught:
        flash_it(second)
    assert caught.value.exit == Exit.LOST
    assert board.dropped.wait(30)
    assert board.current() == "2.0"
    board.drop = ""
    assert not flash_it(second).changed


def test_looking_changes_nothing_and_says_what_would_be_done(
    reach: Reach, fleet: Fleet, make_bundle: BundleMaker, board: Board
) -> None:
    before = sorted(board.root.rglob("*"))
    plan = prepare(reach(), fleet, DEVICE, make_bundle("1.0"))
    assert plan.intended[0] == "install 1.0 (now: nothing)"
    assert sorted(board.root.rglob("*")) == before


def test_a_bundle_for_another_processor_is_refused(reach: Reach, fleet: Fleet, make_bundle: BundleMaker) -> None:
    other = "aarch64" if reach().facts().architecture == "x86_64" else "x86_64"
    with pytest.raises(ProvisionError, match=other) as caught:
        prepare(reach(), fleet, DEVICE, make_bundle("1.0", architecture=other))
    assert caught.value.exit == Exit.WRONG_PLATFORM


def test_a_bundle_for_another_board_is_refused(reach: Reach, fleet: Fleet, make_bundle: BundleMaker) -> None:
    with pytest.raises(ProvisionError, match="bundle build --device box-01") as caught:
        prepare(reach(), fleet, DEVICE, make_bundle("1.0", profile="raspberry-pi-4"))
    assert caught.value.exit == Exit.WRONG_PLATFORM


def test_a_tampered_bundle_is_refused_before_anything_is_sent(
    reach: Reach, fleet: Fleet, make_bundle: BundleMaker, board: Board
) -> None:
    bundle = make_bundle("1.0")
    content = bytearray(bundle.read_bytes())
    content[len(content) // 2] ^= 1
    bundle.write_bytes(content)
    with pytest.raises(ProvisionError) as caught:
        prepare(reach(), fleet, DEVICE, bundle)
    assert caught.value.exit == Exit.VERIFICATION


def test_a_board_of_another_device_is_not_made_this_one(running: Path, flash_it: Flash, board: Board) -> None:
    settings = identity(board) / "agent.toml"
    settings.write_text(settings.read_text().replace(DEVICE, "box-02"))
    with pytest.raises(ProvisionError, match="device box-02, not box-01") as caught:
        flash_it(running)
    assert caught.value.exit == Exit.OTHER_DEVICE


def test_a_board_without_data_is_refused_with_the_option(
    reach: Reach, fleet: Fleet, make_bundle: BundleMaker, board: Board, sign: Sign, tmp_path: Path
) -> None:
    there = board.root / "var/lib/fedeq-edge/data.npz"
    there.unlink()
    bundle, target = make_bundle("1.0"), reach()
    with pytest.raises(ProvisionError, match="--data FILE"):
        prepare(target, fleet, DEVICE, bundle)
    (tmp_path / "mine.npz").write_bytes(b"mine")
    flash(target, fleet, prepare(target, fleet, DEVICE, bundle, data=tmp_path / "mine.npz"), sign=sign)
    assert there.read_bytes() == b"mine"


def test_a_revoked_certificate_is_made_anew(running: Path, flash_it: Flash, board: Board, fleet: Fleet) -> None:
    old = (identity(board) / "device.crt").read_bytes()
    fleet.revoke(DEVICE)
    restarts = board.restarts()
    with pytest.raises(ProvisionError, match=r"was revoked on .*fedeq fleet add"):
        flash_it(running)
    assert board.restarts() == restarts
    fleet.add(DEVICE, "x86-64")
    done = flash_it(running)
    assert "enrol" in [step.name for step in done.steps]
    assert (identity(board) / "device.crt").read_bytes() != old


def test_a_board_is_told_at_the_next_flash_where_the_service_has_moved(
    running: Path, flash_it: Flash, board: Board, fleet: Fleet
) -> None:
    text = (fleet.folder / "fleet.toml").read_text()
    (fleet.folder / "fleet.toml").write_text(text.replace("https://gateway:8443", "https://elsewhere:8443"))
    before = board.restarts()
    assert [step.name for step in flash_it(running).steps] == ["service", "heartbeat"]
    assert (identity(board) / "updater.toml").read_text() == 'service = "https://elsewhere:8443"\n'
    assert "try-restart fedeq-updater.service" in (board.home / "calls").read_text()
    assert board.restarts() == before
    assert not flash_it(running).changed


def test_rolling_back_goes_to_the_release_before(
    running: Path, flash_it: Flash, reach: Reach, make_bundle: BundleMaker, board: Board
) -> None:
    flash_it(make_bundle("2.0"))
    assert roll_back(reach()) == "1.0"
    assert board.current() == "1.0"


def test_rolling_back_without_an_earlier_release_is_refused(running: Path, reach: Reach, board: Board) -> None:
    with pytest.raises(ProvisionError):
        roll_back(reach())
    assert board.current() == "1.0"


def test_this_machine_is_flashed_by_the_same_steps(
    fleet: Fleet, make_bundle: BundleMaker, board: Board, sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", board.environment["PATH"])
    target = LocalTarget(root=str(board.root))
    done = flash(target, fleet, prepare(target, fleet, DEVICE, make_bundle("1.0")), sign=sign)
    assert done.target == "local:"
    assert board.current() == "1.0"
    assert msgspec.to_builtins(done)["version"] == "1.0"
