"""What `fedeq flash` can reach: a board over ssh, this machine, a mounted card, a card or its image.

TARGET decides: ssh://user@host[:port], local:, a directory (the mounted root of a card), a file or a block device.
"""

import re
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fedeq_edge.errors import ConfigError
from fedeq_edge.provision.targets.base import Machine
from fedeq_edge.provision.targets.image import ImageTarget
from fedeq_edge.provision.targets.local import LocalTarget
from fedeq_edge.provision.targets.rootfs import RootfsTarget
from fedeq_edge.provision.targets.ssh import Address, SshTarget

AnyTarget = Machine | ImageTarget | RootfsTarget
_FORMS: Final = "ssh://user@host[:port], local:, the mounted root of a card, a card's device or an image file"


def open_target(text: str, *, known_hosts: Path, accept: str = "") -> AnyTarget:
    """The target that `text` means; a board over ssh is connected.

    known_hosts: file of host keys beside the user's own; a key that is accepted is added to it. accept: fingerprint
    (SHA256:...) that the user has compared. Raises ConfigError on a text that is none, ProvisionError where the board
    cannot be reached, its host key is not known, or a card must not be touched.
    """
    if text == "local:":
        return LocalTarget()
    if text.startswith("ssh://"):
        return SshTarget(_address(text), known_hosts=known_hosts, accept=accept)
    path = Path(text)
    if path.is_dir():
        return RootfsTarget(path)
    if path.exists():
        return ImageTarget(path)
    raise ConfigError(f"target {text!r} is nothing that can be flashed; give {_FORMS}")


def _address(text: str) -> Address:
    parts = urlsplit(text)
    shown = re.sub(r"(?<=//).*:.*(?=@)", "[removed]", text)  # somebody's password, as it may be
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"target {shown!r}: {error}; give ssh://user@host[:port]") from error
    if not parts.hostname or parts.password or parts.path.strip("/") or parts.query:
        raise ConfigError(
            f"target {shown!r} is no ssh address; give ssh://user@host[:port], no password and no path; "
            "passwords are not taken, ssh-copy-id puts your key on the board"
        )
    return Address(host=parts.hostname, user=parts.username or "", port=port)
