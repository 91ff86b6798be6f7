"""Small archives in the forms in which public data sets are published."""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.har import CHANNELS

Files = Mapping[str, bytes]


def zipped(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def tarred(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w:") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def laid_out(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def numbers(table: NDArray[Any]) -> bytes:
    text = io.BytesIO()
    np.savetxt(text, table, fmt="%.7e" if table.dtype.kind == "f" else "%d")
    return text.getvalue()


def har_files(windows: int = 12, *, root: str = "UCI HAR Dataset") -> dict[str, bytes]:
    """UCI HAR with people 1 and 2 in train, 3 in test; each does 2 activities of `windows` overlapping windows each."""
    files = {f"{root}/README.txt": b"", f"__MACOSX/{root}/._README.txt": b""}
    for part, people in (("train", (1, 2)), ("test", (3,))):
        person, label = (np.repeat(people, 2 * windows), np.tile(np.repeat([1, 5], windows), len(people)))
        files[f"{root}/{part}/y_{part}.txt"] = numbers(label)
        files[f"{root}/{part}/subject_{part}.txt"] = numbers(person)
        for place, channel in enumerate(CHANNELS):
            runs = [_overlapping(100.0 * who + 10 * place + act, windows) for who in people for act in (1, 5)]
            files[f"{root}/{part}/Inertial Signals/{channel}_{part}.txt"] = numbers(np.concatenate(runs))
    return files


def _overlapping(base: float, windows: int) -> NDArray[np.float64]:
    """(windows, 128) of one stream, each half a window further."""
    stream = base + np.arange(64 * (windows + 1)) / 1e4
    windowed: NDArray[np.float64] = stream[np.arange(windows)[:, None] * 64 + np.arange(128)]
    return windowed


def hapt_files(people: int = 3) -> dict[str, bytes]:
    """HAPT with a recording of 2560 samples per person: walking, standing to sitting (too short), sitting."""
    rng, files, labels = np.random.default_rng(0), {}, []
    for who in range(1, people + 1):
        for sensor in ("acc", "gyro"):
            files[f"RawData/{sensor}_exp{who:02d}_user{who:02d}.txt"] = numbers(rng.normal(size=(2560, 3)))
        labels += [[who, who, 1, 1, 1280], [who, who, 7, 1281, 1380], [who, who, 4, 1381, 2560]]
    files["RawData/labels.txt"] = numbers(np.array(labels))
    return files


def wisdm_text(person: int, activity: str, samples: int, *, start: int = 1_000_000_000) -> str:
    times = start + np.arange(samples) * 50_000_000
    return "".join(f"{person},{activity},{time},{place / 100},-1.5,2.25E-1;\n" for place, time in enumerate(times))


def idx(array: NDArray[Any]) -> bytes:
    kinds = {"u1": 8, "i4": 12}
    head = bytes([0, 0, kinds[array.dtype.str[1:]], array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digit_files(train: int = 60, test: int = 20, *, prefix: str = "", classes: int = 10, first: int = 0) -> Files:
    """MNIST in small (prefix: of EMNIST's names): labels in turn, image i is all i but its first row, 0."""
    files = {}
    for part, count in (("train", train), ("test" if prefix else "t10k", test)):
        images = np.repeat(np.arange(count, dtype=np.uint8), 784).reshape(-1, 28, 28).copy()
        images[:, 0] = 0
        files[f"{prefix}{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(images))
        files[f"{prefix}{part}-labels-idx1-ubyte.gz"] = gzip.compress(
            idx((np.arange(count) % classes + first).astype(np.uint8))
        )
    return files


def writer_files(train: int = 60, test: int = 20, *, per_writer: int = 20) -> Files:
    """QMNIST's labels for `digit_files`: every writer wrote `per_writer` digits, nobody in both parts."""
    files = {}
    for part, count, base in (("train", train, 0), ("test", test, 2100)):
        table = np.zeros((count, 8), ">i4")
        table[:, 2] = base + np.arange(count) // per_writer
        files[f"qmnist-{part}-labels-idx2-int"] = idx(table)
    return files


def cifar10_files(per_batch: int = 40, test: int = 40) -> dict[str, bytes]:
    return {
        f"cifar-10-batches-bin/{name}.bin": _records(count, 1, seed)
        for seed, (name, count) in enumerate(
            [*((f"data_batch_{n}", per_batch) for n in range(1, 6)), ("test_batch", test)]
        )
    }


def cifar100_files() -> dict[str, bytes]:
    return {
        "cifar-100-binary/train.bin": _records(100, 2, 0),
        "cifar-100-binary/test.bin": _records(40, 2, 1),
        "cifar-100-binary/coarse_label_names.txt": "\n".join(f"group{n}" for n in range(20)).encode(),
    }


def _records(count: int, labels: int, seed: int) -> bytes:
    """Labels in turn (the coarse one of CIFAR-100 is always 3); the second pixel of the red plane says the seed."""
    table = np.random.default_rng(seed).integers(0, 256, size=(count, labels + 3072), dtype=np.uint8)
    table[:, 0] = 3
    table[:, labels - 1] = np.arange(count) % 10
    table[:, labels + 1] = seed
    return table.tobytes()


def leaf(users: Mapping[str, Any]) -> bytes:
    sizes = [len(data["y"]) for data in users.values()]
    return json.dumps({"users": list(users), "num_samples": sizes, "user_data": users}).encode()


def pictures(count: int, shade: float = 1.0) -> dict[str, Any]:
    return {"x": [[shade] * 783 + [128 / 255]] * count, "y": [number % 62 for number in range(count)]}


def speech(count: int) -> dict[str, Any]:
    text = "To be, or not to be: that is the question: whether 'tis nobler in the mind to suffer the slings "
    lines = [(text * 3)[start : start + 80] for start in range(count)]
    return {"x": lines, "y": [(text * 3)[start + 80] for start in range(count)]}
