"""WISDM: phones and watches at 20 Hz, as text lines "person,activity,nanoseconds,x,y,z;".

Sources: Kwapisz et al., SensorKDD 2010 (WISDM_ar_v1.1, 36 people, 6 activities); Weiss et al., IEEE Access 2019 (the
UCI wisdm-dataset, 51 people, 18 activities, a folder per sensor). Windows last 10 s, as in 2010, and overlap by half.
The text of v1.1 has lines without end, with two records, with empty values, with spaces, and moments that come twice
or more, not always with the same values; whatever is no whole record of a moment of its own is counted and left out.
"""

import re
from array import array
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.samples import Reader, Samples
from fedeq_edge.data.archives.signals import cut, window_starts
from fedeq_edge.data.archives.source import Source
from fedeq_edge.errors import DataError

WIDTH: Final = 200  # 10 s
LONGEST_GAP_NS: Final = 1_000_000_000
"""Between two samples of a window: 20 lost samples, a tenth of it; the phones of v1.1 often pause for less."""
PHONE_ACTIVITIES: Final = ("Walking", "Jogging", "Upstairs", "Downstairs", "Sitting", "Standing")
# activity_key.txt of the set: A to S without N
ACTIVITY_KEYS: Final = {
    "A": "walking",
    "B": "jogging",
    "C": "stairs",
    "D": "sitting",
    "E": "standing",
    "F": "typing",
    "G": "teeth",
    "H": "soup",
    "I": "chips",
    "J": "pasta",
    "K": "drinking",
    "L": "sandwich",
    "M": "kicking",
    "O": "catch",
    "P": "dribbling",
    "Q": "writing",
    "R": "clapping",
    "S": "folding",
}
# Every length is bounded, or a file of digits alone would be searched for ever.
_NUMBER: Final = r"(-?[\d.eE-]{1,24})"
_RECORD: Final = re.compile(
    ", ?".join([r"(?<![\w.-])(\d{1,6})", r"([A-Za-z]{1,16})", r"(\d{1,20})", _NUMBER, _NUMBER, _NUMBER])
)
_RAW: Final = r"WISDM_ar_v1\.1_raw\.txt"
_SENSORS: Final = ("phone-accel", "phone-gyro", "watch-accel", "watch-gyro")


class _Records:
    """Records in the order of the files, as columns."""

    def __init__(self, activities: tuple[str, ...]) -> None:
        self._codes = {name: code for code, name in enumerate(activities)}
        self.person, self.activity, self.time = array("q"), array("q"), array("q")
        self.axes = array("d")
        self._last = (0, 0, 0)
        self._written = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """How many records were left out, if any."""
        lost = self._written - len(self.person)
        told = f"{lost} of {self._written} records are not whole, or repeat a moment, and were left out"
        return (told,) if lost > 0 else ()

    def add(self, text: str) -> None:
        """Take the records out of a text."""
        self._written += sum(1 for _ in re.finditer(r"[^\s;,][^;\n]*", text))
        for found in _RECORD.finditer(text):
            person, activity, time, *axes = found.groups()
            values = _floats(axes)
            # Time 0 marks records that v1.1 lost: their values are 0 as well.
            if values is not None and activity in self._codes and 0 < int(time) < 2**63:
                self._take((int(person), self._codes[activity], int(time)), values)

    def _take(self, moment: tuple[int, int, int], values: list[float]) -> None:
        if moment != self._last:
            for column, value in zip((self.person, self.activity, self.time), moment, strict=True):
                column.append(value)
            self.axes.extend(values)
            self._last = moment


def _floats(texts: list[str]) -> list[float] | None:
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return None
    return values if all(abs(value) < 1e6 for value in values) else None  # m/s², rad/s


def _read(source: Source, variant: str) -> Samples:
    raw = source.find(_RAW)
    if raw and variant != _SENSORS[0]:
        raise DataError(
            f"{source.path}: WISDM v1.1 has no {variant}; leave --variant away, or take UCI's wisdm-dataset"
        )
    names = raw[:1] or _sensor_files(source, variant)
    activities = PHONE_ACTIVITIES if raw else tuple(ACTIVITY_KEYS)
    records = _Records(activities)
    for name in names:
        records.add(source.text(name))
    return _windows(source, records, activities if raw else tuple(ACTIVITY_KEYS.values()))


def _sensor_files(source: Source, variant: str) -> list[str]:
    device, sensor = variant.split("-")
    names = source.find(rf"raw/{device}/{sensor}/data_\d{{1,6}}_{sensor}_{device}\.txt")
    if not names:
        raise DataError(f"{source.path}: no raw/{device}/{sensor} in it; choose another --variant")
    return names


def _windows(source: Source, records: _Records, classes: tuple[str, ...]) -> Samples:
    person, activity, time = (
        np.frombuffer(column, np.int64) for column in (records.person, records.activity, records.time)
    )
    stream = np.frombuffer(records.axes, np.float64).reshape(-1, 3)
    starts = np.concatenate([np.zeros(0, np.int64), *(_of_run(run) for run in _runs(person, activity, time))])
    if starts.size == 0:
        raise DataError(f"{source.path}: no activity lasts {WIDTH} samples; fetch the archive again, whole")
    y = activity[starts]
    present, y = np.unique(y, return_inverse=True)
    return Samples(
        x=cut(stream, starts, WIDTH),
        y=y,
        classes=tuple(classes[code] for code in present),
        client=person[starts],
        follows=np.diff(starts, prepend=-WIDTH) < WIDTH,
        notes=records.notes,
    )


def _runs(person: NDArray[np.int64], activity: NDArray[np.int64], time: NDArray[np.int64]) -> list[tuple[int, int]]:
    """[first, end) of records that follow each other: one person, one activity, no gap, time never backwards."""
    if person.size == 0:
        return []
    passed = np.diff(time)
    breaks = (np.diff(person) != 0) | (np.diff(activity) != 0) | (passed < 0) | (passed > LONGEST_GAP_NS)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), person.size]
    return list(pairwise(edges))


def _of_run(run: tuple[int, int]) -> NDArray[np.int64]:
    return window_starts(*run, WIDTH)


WISDM = Reader(
    kind="wisdm",
    holds="WISDM_ar_v1.1_raw.txt, or raw/phone/accel/data_1600_accel_phone.txt",
    fits=lambda source: bool(
        source.find(_RAW) or source.find(r"raw/(?:phone|watch)/(?:accel|gyro)/data_\d{1,6}_\w+\.txt")
    ),
    read=_read,
    variants=_SENSORS,
)
