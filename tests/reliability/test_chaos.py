"""The soak command itself, with real trainers: a short storm and its verdict."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedeq_edge import chaos
from fedeq_edge.audit import Audit
from fedeq_edge.errors import ConfigError
from fedeq_edge.transport import broker as ladder

STORM_S = 200.0  # a trainer takes seconds to start, and each kill of one costs another start


@pytest.mark.broker
@pytest.mark.skipif(ladder.mosquitto_path() is None, reason="mosquitto is not installed: apt-get install mosquitto")
def test_a_short_storm_ends_with_the_verdict_that_nothing_was_lost(tmp_path: Path) -> None:
    command = ("chaos", "--kills", "5", "--seed", "4", "--devices", "2", "--out", str(tmp_path / "storm"), "--json")
    done = subprocess.run(
        [sys.executable, "-m", "fedeq_edge", *command], capture_output=True, text=True, timeout=STORM_S, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["sound"]
    assert sum(told["kills"].values()) == 5
    assert told["contributions"] >= 2
    assert told["rounds"] == told["status"]["round"]
    assert "bit-equal to the oracle over" in done.stderr.splitlines()[-1]


def test_a_storm_needs_an_end_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --minutes or --kills"):
        chaos.run(chaos.Options(out=tmp_path, minutes=None), print)
    (tmp_path / "kept").touch()
    with pytest.raises(ConfigError, match="is not empty; remove it or choose another --out"):
        chaos.run(chaos.Options(out=tmp_path), print)


def test_a_verdict_with_a_difference_is_not_sound_and_says_it() -> None:
    found = Audit(rounds=3, contributions=6, starts=2, difference="round 4 ends with another", duals={})
    verdict = chaos.Verdict(
        audit=found, difference=found.difference, kills={"broker": 2}, faults={"cut": 1}, status={}, wall_s=1.0
    )
    assert not verdict.sound
    assert verdict.sentence == "round 4 ends with another; 2 kills (2 broker), 1 link fault"
    assert verdict.summary()["sound"] is False
