"""A board that boots: systemd is its PID 1, sshd answers in a network namespace of its own, and power can be cut."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import textwrap
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.conftest import until
from tests.devices import rootfs
from tests.devices.cgroups import Group
from tests.devices.cpus import PI_3, PI_4, PI_5, Cpu
from tests.devices.sites import Site

BOOT_S: Final = 90.0  # 1.2 s native, 9 s emulated, on two cores that others use as well
COMMAND_S: Final = 300.0
RESTARTS: Final = 133  # systemd-nspawn(1), exit status, with --keep-unit: the system in it wants to be started again

# qemu-user cannot make the mounts of a confined unit, so an emulated board proves the architecture and not the sandbox.
_RELAXED: Final = """[Service]
ReadWritePaths=
PrivateDevices=no
PrivateTmp=no
PrivateUsers=no
ProtectClock=no
ProtectControlGroups=no
ProtectHome=no
ProtectHostname=no
ProtectKernelLogs=no
ProtectKernelModules=no
ProtectKernelTunables=no
ProtectProc=default
ProtectSystem=no
RestrictNamespaces=no
SystemCallArchitectures=
SystemCallFilter=
RestrictAddressFamilies=
RestrictRealtime=no
RestrictSUIDSGID=no
LockPersonality=no
MemoryDenyWriteExecute=no
"""
_RELAXED_AGENT: Final = f"""{_RELAXED}\
ExecStart=
ExecStart=/opt/fedeq-edge/current/bin/fedeq agent run --config /etc/fedeq-edge/agent.toml
LoadCredential=
DynamicUser=no
"""


class Board:
    """A system in a folder, made to a board at a site. `boot` it; `close` removes all but the folder.

    disk: what it boots from, its own from then on. cpu: of an arm64 board, which qemu-user plays. shown: folders of
    this machine that it sees, by their path on it. `identity`: the private key that root accepts.
    """

    def __init__(
        self,
        folder: Path,
        site: Site,
        name: str,
        disk: rootfs.Disk,
        *,
        cpu: Cpu | None = None,
        shown: Mapping[str, Path] | None = None,
    ) -> None:
        self._disk = disk
        self.root = disk.root
        self.name = name
        self.cpu = cpu
        self.identity = folder / "identity"
        self._folder = folder
        self._console_log = folder / "console.log"
        self._site = site
        self._shown = shown or {}
        self._console: subprocess.Popen[bytes] | None = None
        self._session: subprocess.Popen[bytes] | None = None
        self.namespace, self.address = site.plug()
        self._group = Group(self.namespace)
        self._remains = contextlib.ExitStack()
        for end in (disk.close, self._end_session, self._end_console, self._group.close):  # the last is called first
            self._remains.callback(end)
        self._personalize()

    # Power

    def boot(self) -> None:
        """Power is on, and ssh answers."""
        console = self._power_on()
        until(lambda: self._answers() or console.poll() is not None, f"{self.name} answers by ssh", BOOT_S)
        assert console.poll() is None, self.console()
        if self.cpu is not None:
            self._on_board(["mount", "--bind", _cpuinfo(self.cpu), "/proc/cpuinfo"])
        self._keep_session()

    def boot_until_it_restarts(self) -> None:
        """Power is on, and off when the system asks for a restart, as one that sets itself up does."""
        ended = self._power_on().wait(BOOT_S)
        self._console = None
        assert ended == RESTARTS, self.console()

    def cut_power(self) -> None:
        """Every process of the board is gone at once. What they wrote is in its files, as the kernel is ours."""
        assert self._console is not None, f"{self.name} does not run"
        os.kill(self.leader(), signal.SIGKILL)  # the kernel kills the rest of the PID namespace, and nspawn goes home
        self._end_console()
        self._end_session()
        assert not self._group.pids()

    def close(self) -> None:
        """Power is off and the disk is out, for good; a second time nothing happens."""
        self._remains.close()

    # What can be asked of it

    def ssh(self, command: str, *, data: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command as root with `data` on its standard input. check: it must exit 0."""
        done = self._site.run(["ssh", "-F", str(self.ssh_config), self.name, command], input=data, timeout=COMMAND_S)
        assert done.returncode == 0 or not check, (
            f"{self.name}: {command}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def says(self, command: str) -> str:
        """What a shell command that must succeed prints, without white space around it."""
        return self.ssh(command).stdout.strip()

    def on_cpu(self, cpu: Cpu, script: str, *, python_path: str) -> subprocess.CompletedProcess[str]:
        """Run a python script on this arm64 board as if its processor were another; the shell's exit code is kept."""
        python = f"QEMU_CPU={cpu.qemu} PYTHONPATH={python_path} python3 -"
        play = f"mount --bind {_cpuinfo(cpu)} /proc/cpuinfo; {python}; exit $?"
        return self.ssh(f"unshare --mount sh -c {shlex.quote(play)}", data=textwrap.dedent(script), check=False)

    def console(self) -> str:
        return self._console_log.read_text(errors="replace")

    @property
    def home(self) -> Path:
        """A home folder on the gateway whose .ssh knows this board and how to enter it."""
        return self._folder / "home"

    @property
    def ssh_config(self) -> Path:
        return self.home / ".ssh" / "config"

    @property
    def releases(self) -> Path:
        """The folder of its releases, seen from here."""
        return self.root / "opt" / "fedeq-edge" / "releases"

    def mounted(self, path: str) -> Path:
        """What its disk has mounted there, seen from here."""
        return self._disk.mounts[path]

    def leader(self) -> int:
        """The board's PID 1, as a PID of this machine."""
        return next(pid for pid in self._group.pids() if _is_first(pid))

    # The inside

    def _power_on(self) -> subprocess.Popen[bytes]:
        assert self._console is None, f"{self.name} runs already"
        # systemd says nothing on a console that is no terminal, and script(1) is one
        self._console = self._site.start(
            self._group.inside(["script", "-qefc", shlex.join(self._nspawn()), "/dev/null"]), self._console_log
        )
        return self._console

    def _end_console(self) -> None:
        if self._console is not None:
            self._console.wait(BOOT_S)
            self._console = None

    def _keep_session(self) -> None:
        """What `ssh` runs goes through one connection: each of its own costs 0.2 s, and 2 s under emulation."""
        connect = ["ssh", "-F", str(self.ssh_config), "-M", "-N", self.name]
        session = self._session = self._site.start(connect, self._folder / "session.log")
        until(lambda: self._socket.exists() or session.poll() is not None, f"{self.name} lets root in", BOOT_S)
        assert session.poll() is None, (self._folder / "session.log").read_text()

    def _end_session(self) -> None:
        if self._session is not None:
            self._session.kill()
            self._session.wait()
            self._session = None
        self._socket.unlink(missing_ok=True)

    @property
    def _socket(self) -> Path:
        return self._folder / "ssh"  # short, as no path of a socket may have more than 108 bytes

    def _nspawn(self) -> list[str]:
        # This machine has neither systemd nor D-Bus to register with.
        options = ["--register=no", "--keep-unit", "--resolv-conf=off", "--timezone=off", "--link-journal=no"]
        options += [f"--bind-ro={here}:{there}" for there, here in self._shown.items()]
        options += [f"--bind={here}:{there}" for there, here in self._disk.mounts.items()]
        emulation = [] if self.cpu is None else [f"--setenv=QEMU_CPU={self.cpu.qemu}"]
        # Two boards at two sites may have one name, and machines here may not.
        where = [f"--directory={self.root}", f"--machine={self.namespace}", f"--hostname={self.name}"]
        network = f"--network-namespace-path=/run/netns/{self.namespace}"
        return [
            "systemd-nspawn",
            "--quiet",
            *options,
            *emulation,
            *where,
            network,
            "--boot",
            *self._disk.kernel_words(),
        ]

    def _personalize(self) -> None:
        etc = self.root / "etc"
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")  # an empty one makes this a first boot, with questions
        self._make_keys(etc)
        if self.cpu is not None:
            self._emulate(etc, self.cpu)

    def _make_keys(self, etc: Path) -> None:
        for stale in (etc / "ssh").glob("ssh_host_*"):  # all boards have them from the same tar file
            stale.unlink()
        _keygen(etc / "ssh" / "ssh_host_ed25519_key")
        _keygen(self.identity)
        authorized = self.root / "root" / ".ssh" / "authorized_keys"
        authorized.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(f"{self.identity}.pub", authorized)
        self.ssh_config.parent.mkdir(parents=True)
        known = self.ssh_config.with_name("known_hosts")
        known.write_text(f"{self.address} {(etc / 'ssh' / 'ssh_host_ed25519_key.pub').read_text()}")
        self.ssh_config.write_text(
            f"Host {self.name} {self.address}\n  HostName {self.address}\n  User root\n"
            f"  IdentityFile {self.identity}\n  IdentitiesOnly yes\n  UserKnownHostsFile {known}\n"
            "  StrictHostKeyChecking yes\n  BatchMode yes\n  ConnectTimeout 20\n"
            f"  ControlPath {self._socket}\n"
        )

    def _emulate(self, etc: Path, cpu: Cpu) -> None:
        """Units and ssh sessions start with an environment of their own, so all three are told of the model."""
        (etc / "environment").write_text(f"QEMU_CPU={cpu.qemu}\n")
        manager = etc / "systemd" / "system.conf.d" / "qemu.conf"
        manager.parent.mkdir(parents=True, exist_ok=True)
        manager.write_text(f"[Manager]\nDefaultEnvironment=QEMU_CPU={cpu.qemu}\n")
        for unit, relaxed in (("fedeq-agent", _RELAXED_AGENT), ("fedeq-updater", _RELAXED)):
            drop_in = etc / "systemd" / "system" / f"{unit}.service.d" / "emulated.conf"
            drop_in.parent.mkdir(parents=True)
            drop_in.write_text(relaxed)
        for playable in (PI_3, PI_4, PI_5):
            (self.root / _cpuinfo(playable).lstrip("/")).write_text(playable.cpuinfo)

    def _on_board(self, command: list[str]) -> None:
        subprocess.run(["nsenter", "-t", str(self.leader()), "-m", "-p", *command], check=True, timeout=COMMAND_S)

    def _answers(self) -> bool:
        with (
            self._site.entered(),
            contextlib.suppress(OSError),
            socket.create_connection((self.address, 22), 1.0) as connection,
        ):
            return connection.recv(4) == b"SSH-"
        return False


def _cpuinfo(cpu: Cpu) -> str:
    return f"/etc/cpuinfo-{cpu.qemu}"


def _is_first(pid: int) -> bool:
    """Whether it is PID 1 of the namespace it runs in (proc(5), NSpid)."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
        return len(numbers) > 1 and numbers[-1] == "1"
    return False


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
