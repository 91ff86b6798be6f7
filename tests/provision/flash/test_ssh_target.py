"""The ssh target against a real ssh server in this process."""

from pathlib import Path

import asyncssh
import pytest

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.targets.base import get, make_folder, put
from fedeq_edge.provision.targets.hostkeys import HostKeys
from fedeq_edge.provision.targets.ssh import Address, SshTarget
from tests.provision.flash.board import Board, Reach, Server


def test_a_command_has_its_arguments_as_given_and_its_input(reach: Reach) -> None:
    done = reach().run(["sh", "-c", 'cat; echo "$1" >&2; exit 3', "x", "a b; $HOME '"], input=b"\x00\xff")
    assert (done.code, done.out, done.err) == (3, b"\x00\xff", b"a b; $HOME '\n")


def test_a_file_is_put_whole_with_its_mode_and_read_back(reach: Reach, board: Board) -> None:
    target, content = reach(), bytes(range(256)) * 20_000
    make_folder(target, f"{board.root}/opt/new", mode=0o700)
    put(target, content, f"{board.root}/opt/new/file", mode=0o600)
    assert get(target, f"{board.root}/opt/new/file") == content
    assert (board.root / "opt/new/file").stat().st_mode & 0o777 == 0o600
    assert (board.root / "opt/new").stat().st_mode & 0o777 == 0o700
    assert get(target, f"{board.root}/opt/new/other") is None


def test_a_file_that_comes_half_leaves_the_old_one(reach: Reach, board: Board) -> None:
    target, path = reach(), board.root / "opt/file"
    put(target, b"old", str(path))
    board.drop = "cat >"
    with pytest.raises(ProvisionError) as caught:
        put(target, b"new", str(path))
    assert caught.value.exit == Exit.LOST
    assert path.read_bytes() == b"old"


def test_facts_are_those_of_the_machine_that_answers(reach: Reach) -> None:
    facts = reach().facts()
    assert facts.systemd == 252
    assert facts.booted
    assert facts.python.startswith("3.")


def test_an_unknown_host_key_is_refused_with_its_fingerprint_and_the_flag(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="not known") as caught:
        SshTarget(server.address, known_hosts=tmp_path / "known")
    assert caught.value.exit == Exit.HOST_KEY
    assert f"--accept-host-key {server.fingerprint}" in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "file"), [("ssh-rsa", "rsa"), ("ecdsa-sha2-nistp256", "ecdsa"), ("ssh-ed25519", "ed25519")]
)
def test_the_refusal_names_the_file_that_holds_the_key_which_was_shown(
    algorithm: str, file: str, tmp_path: Path
) -> None:
    keys = HostKeys(tmp_path / "known", accept="")
    shown = asyncssh.generate_private_key(algorithm).convert_to_public()
    assert not keys.client().validate_host_public_key("board", "10.0.0.5", 22, shown)
    assert f"ssh-keygen -lf /etc/ssh/ssh_host_{file}_key.pub, " in str(keys.refusal("ssh://board"))


def test_a_fingerprint_that_is_accepted_is_remembered(server: Server, board: Board, tmp_path: Path) -> None:
    known, root = tmp_path / "known", str(board.root)
    SshTarget(server.address, known_hosts=known, accept=server.fingerprint, root=root).close()
    SshTarget(server.address, known_hosts=known, root=root).close()
    assert known.stat().st_mode & 0o777 == 0o600


def test_another_fingerprint_than_the_one_shown_is_not_accepted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ProvisionError) as caught:
        SshTarget(server.address, known_hosts=tmp_path / "known", accept="SHA256:" + "A" * 43)
    assert caught.value.exit == Exit.HOST_KEY
    assert not (tmp_path / "known").exists()


def test_a_changed_host_key_is_named_so_and_accepted_in_place_of_the_old(
    server: Server, board: Board, tmp_path: Path
) -> None:
    known, old = tmp_path / "known", asyncssh.generate_private_key("ssh-ed25519")
    known.write_text(f"[127.0.0.1]:{server.port} {old.export_public_key('openssh').decode()}")
    with pytest.raises(ProvisionError, match="CHANGED") as caught:
        SshTarget(server.address, known_hosts=known)
    assert str(old.get_fingerprint()) in str(caught.value)
    SshTarget(server.address, known_hosts=known, accept=server.fingerprint, root=str(board.root)).close()
    assert old.export_public_key("openssh").decode().split()[1] not in known.read_text()


def test_the_users_ssh_configuration_is_honoured(server: Server, home: Path, board: Board, tmp_path: Path) -> None:
    lines = ["Host board", "  HostName 127.0.0.1", f"  Port {server.port}", "  User pi", "  UserKnownHostsFile ~/known"]
    (home / ".ssh/config").write_text("\n".join(lines))
    (home / "known").write_text(server.known_line())
    target = SshTarget(Address(host="board"), known_hosts=tmp_path / "none", root=str(board.root))
    assert target.run(["true"]).code == 0
    target.close()


def test_a_configuration_that_takes_any_host_key_is_not_followed(server: Server, home: Path, tmp_path: Path) -> None:
    (home / ".ssh/config").write_text("Host *\n  UserKnownHostsFile none\n  StrictHostKeyChecking no\n")
    with pytest.raises(ProvisionError) as caught:
        SshTarget(server.address, known_hosts=tmp_path / "known")
    assert caught.value.exit == Exit.HOST_KEY


def test_nobody_at_the_address_is_exit_8(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="does ssh -p 1 pi@127") as caught:
        SshTarget(Address(host="127.0.0.1", user="pi", port=1), known_hosts=tmp_path / "known")
    assert caught.value.exit == Exit.LOST


def test_a_key_that_the_board_does_not_know_is_said_with_the_remedy(server: Server, home: Path, tmp_path: Path) -> None:
    (home / ".ssh/known_hosts").write_text(server.known_line())
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(home / ".ssh/id_ed25519")
    with pytest.raises(ProvisionError, match="ssh-copy-id") as caught:
        SshTarget(server.address, known_hosts=tmp_path / "known")
    assert caught.value.exit == Exit.FAILED


def test_a_user_who_is_not_root_works_by_sudo(server: Server, board: Board, home: Path, tmp_path: Path) -> None:
    (home / ".ssh/known_hosts").write_text(server.known_line())
    board.program("id", "#!/bin/sh\necho 1000\n")
    board.program("sudo", '#!/bin/sh\n[ "$1 $2" = "-n --" ] && shift 2 && exec "$@"\n')
    target = SshTarget(server.address, known_hosts=tmp_path / "known")
    assert target.run(["echo", "hello"]).out == b"hello\n"
    assert board.commands[-1] == "sudo -n -- echo hello"
    target.close()


def test_a_sudo_that_asks_for_a_password_is_said_with_the_remedy(
    server: Server, board: Board, home: Path, tmp_path: Path
) -> None:
    (home / ".ssh/known_hosts").write_text(server.known_line())
    board.program("id", "#!/bin/sh\necho 1000\n")
    board.program("sudo", "#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n")
    with pytest.raises(ProvisionError, match="NOPASSWD"):
        SshTarget(server.address, known_hosts=tmp_path / "known")


def test_a_command_whose_connection_goes_is_exit_8(reach: Reach, board: Board) -> None:
    target = reach()
    board.drop = "uname"
    with pytest.raises(ProvisionError, match="keeps running what it ran") as caught:
        target.run(["uname"])
    assert caught.value.exit == Exit.LOST


def test_lines_come_as_they_are_printed(reach: Reach) -> None:
    lines = reach().stream(["sh", "-c", "echo one; echo two; exec sleep 60"])
    assert [next(lines), next(lines)] == ["one", "two"]
    lines.close()  # type: ignore[attr-defined]  # a generator; the command ends with it
