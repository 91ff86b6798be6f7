"""What is put on a card so that its first boot installs, enrols and starts the agent, and how that boot is told of it.

Pure: texts in, texts out. Raspberry Pi OS reads `user-data` of its boot partition by cloud-init since trixie; before, a
`firstrun.sh` is named on the kernel's command line. Any other system gets the unit into its root partition.
"""

import email
import email.message
import email.policy
import json
import re
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Final

import msgspec

FIRST_BOOT: Final = Path(__file__).with_name("first_boot.py").read_bytes()
UNIT_NAME: Final = "fedeq-first-boot.service"
BOOT_FOLDER: Final = "/boot/firmware/fedeq"  # Raspberry Pi OS mounts its FAT partition there since bookworm
ROOT_FOLDER: Final = "/opt/fedeq-edge/first-boot"
SCRIPT_PATH: Final = "/opt/fedeq-edge/first_boot.py"
_PART: Final = "fedeq-first-boot.sh"
_BOUNDARY: Final = "==fedeq-edge=="  # fixed: the same card twice, the same bytes
_RUN: Final = (
    "systemd.run=/boot/firmware/firstrun.sh systemd.run_success_action=reboot systemd.unit=kernel-command-line.target"
)
# By the first line of a file, as cloud-init tells them (cloudinit/handlers/__init__.py, INCLUSION_TYPES_MAP).
_TYPES: Final = {
    "#cloud-config-archive": "cloud-config-archive",
    "#cloud-config": "cloud-config",
    "#cloud-boothook": "cloud-boothook",
    "#include": "x-include-url",
    "#part-handler": "part-handler",
    "## template: jinja": "jinja2",
    "#!": "x-shellscript",
}


def unit(folder: str) -> bytes:
    """The unit that runs first_boot.py until it has succeeded; folder: where the card's part is mounted."""
    return f"""\
[Unit]
Description=fedeq-edge first boot: install, enrol, start
Wants=network-online.target
After=network-online.target
RequiresMountsFor={folder}
ConditionPathExists={folder}/card.json

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -I {SCRIPT_PATH} {folder}
# Until the network and the fleet's service are there.
Restart=on-failure
RestartSec=30
TimeoutStartSec=900

[Install]
WantedBy=multi-user.target
""".encode()


def arrange() -> bytes:
    """Shell: the unit is enabled on the board, and started at once where "later" is not asked for."""
    return f"""\
#!/bin/sh
# Written by fedeq flash: puts the first boot's unit into the system.
set -e
here={BOOT_FOLDER}
mkdir -p /opt/fedeq-edge
install -m 755 "$here/first_boot.py" {SCRIPT_PATH}
install -m 644 "$here/{UNIT_NAME}" /etc/systemd/system/{UNIT_NAME}
systemctl daemon-reload
systemctl enable {UNIT_NAME}
[ "$1" = later ] || systemctl start --no-block {UNIT_NAME}
""".encode()


def join_text(*, service: str, token: str) -> bytes:
    """join.toml, as enrol.py reads it."""
    return msgspec.toml.encode({"service": service, "token": token})


def card_text(*, device: str, sha256: str) -> bytes:
    """card.json: that there is a first boot to be done, whose, and the digest of the bundle that the card brings."""
    return json.dumps({"device": device, "sha256": sha256}).encode() + b"\n"


def merged_user_data(existing: bytes) -> bytes:
    """user-data with our script as one part more; what was there is in it as it was, a part of its own.

    Parts are how cloud-init joins what several wrote: lists such as runcmd are not touched, and no YAML is rewritten.
    """
    parts = [part for part in _parts(existing.decode()) if part.get_filename() != _PART]
    document = MIMEMultipart(boundary=_BOUNDARY)
    for part in [*parts, _part(f"#!/bin/sh\nexec sh {BOOT_FOLDER}/arrange.sh now\n", _PART)]:
        document.attach(part)
    return document.as_bytes(policy=email.policy.default)


def _parts(text: str) -> list[email.message.Message]:
    if not text.strip():
        return []
    found = email.message_from_string(text)
    if found.get_content_maintype() == "multipart" and "content-type" in found:
        payload = found.get_payload()
        return (
            [part for part in payload if isinstance(part, email.message.Message)] if isinstance(payload, list) else []
        )
    return [_part(text, "user-data")]


def _part(text: str, name: str) -> MIMEText:
    kind = next((kind for start, kind in _TYPES.items() if text.startswith(start)), "cloud-config")
    part = MIMEText(text, kind, "us-ascii" if text.isascii() else "utf-8")
    part.add_header("Content-Disposition", "attachment", filename=name)
    return part


def merged_firstrun(existing: bytes | None) -> bytes:
    """firstrun.sh that also arranges our first boot; what was there runs as it did."""
    ours = f"sh {BOOT_FOLDER}/arrange.sh later || true\n"
    if existing is None:
        return _own_firstrun(ours).encode()
    text = existing.decode()
    if ours in text:
        return existing
    first, _, rest = text.partition("\n")
    return f"{first}\n{ours}{rest}".encode()


def _own_firstrun(ours: str) -> str:
    return (
        f"#!/bin/sh\n{ours}rm -f /boot/firmware/firstrun.sh\n"
        "sed -i 's| systemd[.]run[^ ]*||g; s| systemd[.]unit=kernel-command-line[.]target||g' "
        "/boot/firmware/cmdline.txt\nexit 0\n"
    )


def merged_cmdline(existing: bytes) -> bytes:
    """The kernel's command line that runs firstrun.sh, once."""
    line = existing.decode().strip()
    return existing if re.search(r"(^| )systemd[.]run=", line) else f"{line} {_RUN}\n".encode()
