"""What is merged into a card's first-boot files: what others wrote there stays as it was."""

import email
import email.message
import subprocess

import pytest

from fedeq_edge.provision.card import arrange, merged_cmdline, merged_firstrun, merged_user_data, unit

IMAGER = b"#cloud-config\nhostname: pi\nruncmd:\n  - [touch, /theirs]\n# a comment, \xc3\xa4\n"
CMDLINE = b"console=serial0,115200 root=PARTUUID=1-02 rootfstype=ext4 rootwait\n"


def parts(user_data: bytes) -> list[tuple[str, bytes]]:
    """Type and content of each part, as cloud-init takes them apart."""
    found = email.message_from_bytes(user_data)
    assert found.is_multipart()
    payload = found.get_payload()
    assert isinstance(payload, list)
    contents = []
    for part in payload:
        assert isinstance(part, email.message.Message)
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        contents.append((part.get_content_type(), content))
    return contents


def test_user_data_keeps_what_was_there_and_gets_a_script_of_ours() -> None:
    theirs, ours = parts(merged_user_data(IMAGER))
    assert theirs == ("text/cloud-config", IMAGER)
    assert ours[0] == "text/x-shellscript"
    assert b"/boot/firmware/fedeq/arrange.sh" in ours[1]


def test_merging_twice_is_merging_once() -> None:
    once = merged_user_data(IMAGER)
    assert merged_user_data(once) == once


def test_empty_user_data_gets_our_part_alone() -> None:
    assert len(parts(merged_user_data(b"\n"))) == 1


@pytest.mark.parametrize(
    ("first", "kind"),
    [(b"#!/bin/sh", "text/x-shellscript"), (b"#include", "text/x-include-url"), (b"## template: jinja", "text/jinja2")],
)
def test_each_kind_of_user_data_keeps_its_kind(first: bytes, kind: str) -> None:
    assert parts(merged_user_data(first + b"\nrest\n"))[0] == (kind, first + b"\nrest\n")


def test_a_firstrun_of_the_imager_runs_ours_and_then_its_own() -> None:
    theirs = b"#!/bin/bash\n\nset +e\nrm -f /boot/firstrun.sh\nexit 0\n"
    merged = merged_firstrun(theirs)
    lines = merged.splitlines()
    assert lines[0] == b"#!/bin/bash"
    assert lines[1] == b"sh /boot/firmware/fedeq/arrange.sh later || true"
    assert lines[2:] == theirs.splitlines()[1:]
    assert merged_firstrun(merged) == merged


def test_a_card_without_firstrun_gets_one_that_takes_itself_off_the_command_line() -> None:
    script = merged_firstrun(None).decode()
    line = merged_cmdline(CMDLINE)
    sed = next(row for row in script.splitlines() if row.startswith("sed"))
    expression = sed.split("'")[1]
    done = subprocess.run(["sed", expression], input=line, capture_output=True, check=True)
    assert done.stdout == CMDLINE


def test_the_command_line_is_changed_once_and_stays_one_line() -> None:
    once = merged_cmdline(CMDLINE)
    assert once.count(b"\n") == 1
    assert merged_cmdline(once) == once


@pytest.mark.parametrize("script", [arrange(), merged_firstrun(None)])
def test_scripts_are_shell(script: bytes) -> None:
    assert subprocess.run(["sh", "-n"], input=script, capture_output=True, check=False).stderr == b""


def test_the_unit_waits_for_the_network_and_runs_until_it_has_succeeded() -> None:
    text = unit("/boot/firmware/fedeq").decode()
    assert "After=network-online.target" in text
    assert "Restart=on-failure" in text
    assert "ConditionPathExists=/boot/firmware/fedeq/card.json" in text
