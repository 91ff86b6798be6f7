"""UCI HAR and HAPT: 30 people with a phone at the waist, 50 Hz, windows of 128 samples that overlap by half.

Sources: Anguita et al., ESANN 2013; Reyes-Ortiz et al., Neurocomputing 2015. Both give 9 channels: body acceleration
(g), angular speed (rad/s), total acceleration (g), each x, y, z. HAPT comes as raw recordings, which are filtered
here as its authors say they did.
"""

import re
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.samples import Reader, Samples
from fedeq_edge.data.archives.signals import Signal, columns, cut, low_pass, median_of_three, window_starts
from fedeq_edge.data.archives.source import Source
from fedeq_edge.errors import DataError

WIDTH: Final = 128
RATE_HZ: Final = 50.0
CHANNELS: Final = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
ACTIVITIES: Final = (
    "WALKING",
    "WALKING_UPSTAIRS",
    "WALKING_DOWNSTAIRS",
    "SITTING",
    "STANDING",
    "LAYING",
    "STAND_TO_SIT",
    "SIT_TO_STAND",
    "SIT_TO_LIE",
    "LIE_TO_SIT",
    "STAND_TO_LIE",
    "LIE_TO_STAND",
)
TEST_PEOPLE: Final = (2, 4, 9, 10, 12, 13, 18, 20, 24)
"""Who is in the authors' test part, of either set."""
_BASIC: Final = 6  # the activities before the postural transitions
_RECORDING: Final = r"acc_exp(\d{1,3})_user(\d{1,3})\.txt"


def _read_har(source: Source, _variant: str) -> Samples:
    parts = [_har_part(source, part) for part in ("train", "test")]
    x, y, person = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Samples(
        x=x,
        y=y - 1,
        classes=ACTIVITIES[:_BASIC],
        client=person,
        official_test=np.repeat([False, True], [part[1].size for part in parts]),
        follows=_continued(x, person),
    )


def _har_part(source: Source, part: str) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """x (N, 9, 128), labels 1 to 6 and people (N,) of "train" or "test"."""
    y = _whole(source, rf"{part}/y_{part}\.txt", _BASIC)
    person = _whole(source, rf"{part}/subject_{part}\.txt", 30)
    x = np.empty((y.size, len(CHANNELS), WIDTH), np.float32)
    for place, channel in enumerate(CHANNELS):
        name = source.one(rf"{part}/Inertial Signals/{channel}_{part}\.txt")
        signal = _numbers(source, name, WIDTH)
        if not len(signal) == y.size == person.size:
            raise DataError(
                f"{source.path}: {name} has {len(signal)} windows, but there are {y.size} labels and {person.size} "
                "people; fetch the archive again, whole"
            )
        x[:, place] = signal
    return x, y, person


def _continued(x: NDArray[np.float32], person: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) whether the first half of a window is the second half of the one before."""
    half = WIDTH // 2
    same = np.array([np.array_equal(before[:, half:], after[:, :half]) for before, after in pairwise(x)], dtype=bool)
    return np.concatenate([[False], same & (person[1:] == person[:-1])])


def _read_hapt(source: Source, _variant: str) -> Samples:
    # Clipped, because numbers beyond int64 have no cast; none of these places is in a recording.
    segments = np.clip(_numbers(source, source.one(r"RawData/labels\.txt"), 5), -1, 1e9).astype(np.int64)
    cuts = [_windows_of(source, name, segments) for name in source.find(f"RawData/{_RECORDING}")]
    x, y, person, follows = (np.concatenate(arrays) for arrays in zip(*cuts, strict=True))
    if y.size == 0:
        raise DataError(f"{source.path}: no labelled segment lasts {WIDTH} samples; fetch the archive again, whole")
    return Samples(
        x=x, y=y, classes=ACTIVITIES, client=person, official_test=np.isin(person, TEST_PEOPLE), follows=follows
    )


def _windows_of(
    source: Source, name: str, segments: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """x, y, person and `follows` of the windows in one recording, segment by segment."""
    found = re.search(_RECORDING, name)
    assert found is not None
    experiment, person = int(found[1]), int(found[2])
    stream = _filtered(
        _numbers(source, name, 3), _numbers(source, source.one(re.escape(_gyro(name.rpartition("/")[2]))), 3)
    )
    starts, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for _, _, activity, first, last in segments[segments[:, 0] == experiment]:
        if not (1 <= activity <= len(ACTIVITIES) and 1 <= first <= last <= len(stream)):
            raise DataError(
                f"{source.path}: labels.txt has activity {activity} from {first} to {last} in recording {experiment} "
                f"of {len(stream)} samples; fetch the archive again, whole"
            )
        starts.append(window_starts(first - 1, last, WIDTH))
        labels.append(np.full(starts[-1].size, activity - 1))
    begin, y = np.concatenate(starts), np.concatenate(labels)
    follows = np.diff(begin, prepend=-WIDTH) < WIDTH
    return cut(stream, begin, WIDTH), y, np.full(y.size, person), follows


def _gyro(name: str) -> str:
    return name.replace("acc_", "gyro_", 1)


def _filtered(acceleration: Signal, turning: Signal) -> Signal:
    """(samples, 9): median of 3 and 20 Hz against noise; what is left below 0.3 Hz is gravity."""
    rows = min(len(acceleration), len(turning))
    both = np.concatenate([acceleration[:rows], turning[:rows]], axis=1)
    smooth = low_pass(median_of_three(both), 20.0, RATE_HZ)
    total = smooth[:, :3]
    return np.concatenate([total - low_pass(total, 0.3, RATE_HZ), smooth[:, 3:], total], axis=1)


def _whole(source: Source, pattern: str, largest: int) -> NDArray[np.int64]:
    """The one column of a file, integers from 1 to `largest`."""
    name = source.one(pattern)
    values = _numbers(source, name, 1)[:, 0]
    if not ((values >= 1) & (values <= largest) & (values % 1 == 0)).all():
        raise DataError(f"{source.path}: {name} has values beyond 1 to {largest}; fetch the archive again, whole")
    return values.astype(np.int64)


def _numbers(source: Source, name: str, count: int) -> Signal:
    try:
        return columns(source.read(name), count)
    except ValueError as error:
        raise DataError(f"{source.path}: {name} cannot be read ({error}); fetch the archive again, whole") from None


HAR = Reader(
    kind="har",
    holds='UCI HAR\'s "train/Inertial Signals"',
    fits=lambda source: bool(source.find(r"train/Inertial Signals/total_acc_x_train\.txt")),
    read=_read_har,
)
HAPT = Reader(
    kind="hapt",
    holds='HAPT\'s "RawData/acc_exp01_user01.txt"',
    fits=lambda source: bool(source.find(f"RawData/{_RECORDING}")),
    read=_read_hapt,
)
