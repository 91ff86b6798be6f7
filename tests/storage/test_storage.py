"""State on disk: old or new and never half, damage is named, one owner at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import msgspec
import numpy as np
import pytest

from fedeq_edge import storage, structs
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.state import ClientState, Pending
from fedeq_edge.storage import AggregatorFolder, ClientFolder, history, locked

STATE = ClientState(
    run="r",
    accepted_round=3,
    z=np.arange(5, dtype=np.float32),
    nu=np.full(5, -(2**40), np.int64),
    dual=b"name",
    head=np.zeros(0, np.float32),
    pending=Pending(round=4, kappa=0.1, blob=b"blob", transfer=b"name"),
)


def fails(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateError, match="pipe: it is no regular file; choose another name"):
        storage.write_atomically(tmp_path / "pipe", b"content")
    assert (tmp_path / "pipe").is_fifo()
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_a_client_remembers_everything(tmp_path: Path) -> None:
    ClientFolder(tmp_path).save(STATE)
    loaded = ClientFolder(tmp_path).load()
    np.testing.assert_equal(msgspec.structs.asdict(loaded), msgspec.structs.asdict(STATE))
    assert loaded.z.flags.writeable


def test_a_client_without_a_file_has_no_federation(tmp_path: Path) -> None:
    assert ClientFolder(tmp_path).load().run == ""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ClientFolder(tmp_path)
    folder.save(STATE)
    monkeypatch.setattr(os if step == "fsync" else Path, step, fails)
    with pytest.raises(StateError, match=r"cannot write .*client.state: No space left on device; free some space"):
        folder.save(ClientState(run="another"))
    assert ClientFolder(tmp_path).load().run == "r"


def test_a_half_written_neighbour_is_not_read(tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path)
    folder.save(STATE)
    (tmp_path / ".client.state.new").write_bytes(b"half")
    assert folder.load().run == "r"
    folder.save(ClientState(run="s"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client.state", "outbox"]


def test_every_damaged_byte_is_named_and_nothing_is_replaced(tmp_path: Path) -> None:
    ClientFolder(tmp_path).save(ClientState(run="r"))
    path = tmp_path / "client.state"
    sound = path.read_bytes()
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(
            StateError, match=r"client.state is damaged \((its checksum differs|it is no state file).*\)"
        ):
            ClientFolder(tmp_path).load()
    path.write_bytes(sound[:20])
    with pytest.raises(StateError, match="is damaged"):
        ClientFolder(tmp_path).load()
    assert path.read_bytes() == sound[:20]


def test_a_sound_file_of_another_kind_is_named(tmp_path: Path) -> None:
    storage.save(tmp_path / "client.state", {"state": {"run": 5}, "held": [1, 0]})
    with pytest.raises(StateError, match=r"is damaged \(Expected `str`, got `int` - at `\$.state.run`\)"):
        ClientFolder(tmp_path).load()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "client.state").mkdir()
    with pytest.raises(StateError, match="cannot be read: Is a directory"):
        ClientFolder(tmp_path).load()


def test_a_vector_of_a_type_that_is_not_ours_is_refused() -> None:
    packed = msgspec.msgpack.encode({"run": "r", "z": ["|O8", [1], b"\0" * 8]})
    with pytest.raises(msgspec.ValidationError, match=r"vector of type \|O8"):
        structs.unpack(packed, ClientState)


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "folder") as folder:
        assert folder.is_dir()
        code = (
            "import sys; from pathlib import Path; from fedeq_edge import storage, errors\n"
            "try:\n    storage.locked(Path(sys.argv[1])).__enter__()\n"
            "except errors.StateError as error: print(error)"
        )
        told = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
        assert "is in use by another process; stop it or use another folder" in told.stdout
    with locked(folder):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StateError, match=r"state folder .*file/state cannot be used: Not a directory"),
        locked(tmp_path / "file" / "state"),
    ):
        pass


# History and status


def line(number: int, **more: object) -> dict[str, object]:
    return {"kind": "round", "round": number, **more}


def test_history_leaves_out_the_line_that_is_being_written(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    folder.record(line(1))
    with (tmp_path / "rounds.jsonl").open("a") as output:
        output.write('{"kind": "round", "rou')
    assert history(tmp_path) == [line(1)]
    assert history(tmp_path / "nowhere") == []


def test_a_half_line_of_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    AggregatorFolder(tmp_path).record(line(1))
    with (tmp_path / "rounds.jsonl").open("a") as output:
        output.write('{"kind": "round", "rou')
    AggregatorFolder(tmp_path).record(line(2))
    assert history(tmp_path) == [line(1), line(2)]


def test_a_line_that_was_written_again_after_a_crash_counts_once(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    report = {"kind": "report", "round": 3, "device": "a"}
    for item in (line(1, step=0.5), line(2, step=0.1), line(2, step=0.2), report, report):
        folder.record(item)
    assert history(tmp_path) == [line(1, step=0.5), line(2, step=0.2), report]


def test_what_is_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    folder.record(line(1, devices={"a": {"accuracy": float("nan")}}, step=float("inf"), late=(float("-inf"), 1.0)))
    text = (tmp_path / "rounds.jsonl").read_text()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (told["devices"], told["step"], told["late"]) == ({"a": {"accuracy": None}}, None, [None, 1.0])


def test_status_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = AggregatorFolder(tmp_path)
    folder.write_status({"round": 1, "loss": float("nan")})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fails)
        with pytest.raises(StateError, match=r"cannot write .*status.json"):
            folder.write_status({"round": 2})
    assert json.loads((tmp_path / "status.json").read_text()) == {"round": 1, "loss": None}
