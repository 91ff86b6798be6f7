"""Where things are on a board (CONTRIBUTING.md, device layout), under a root that is empty on the running machine."""

from dataclasses import dataclass

AGENT = "fedeq-agent.service"
UPDATER = "fedeq-updater.service"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths on one board. root: "" for the machine that answers, or where its file system is mounted."""

    root: str = ""

    @property
    def home(self) -> str:
        """The installer, the trusted key, the releases, `current` and state.json."""
        return f"{self.root}/opt/fedeq-edge"

    @property
    def incoming(self) -> str:
        """What is on its way to be installed."""
        return f"{self.home}/incoming"

    @property
    def installer(self) -> str:
        """release.py: standard library alone."""
        return f"{self.home}/release.py"

    @property
    def program(self) -> str:
        """`fedeq` of the release that runs."""
        return f"{self.home}/current/bin/fedeq"

    @property
    def identity(self) -> str:
        """agent.toml, device.key, device.crt, ca.crt, join.toml: root's alone, and part of no release."""
        return f"{self.root}/etc/fedeq-edge"

    @property
    def state(self) -> str:
        """StateDirectory of the agent: data.npz, state/status.json."""
        return f"{self.root}/var/lib/fedeq-edge"

    @property
    def units(self) -> str:
        """Where the administrator's units are."""
        return f"{self.root}/etc/systemd/system"
