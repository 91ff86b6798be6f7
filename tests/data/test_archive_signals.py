"""UCI HAR, HAPT and WISDM: windows of sensor streams."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.data.archives import Samples, Source, read
from fedeq_edge.data.archives.signals import low_pass
from fedeq_edge.errors import ConfigError, DataError
from tests.data.archives import Files, hapt_files, har_files, laid_out, tarred, wisdm_text, zipped


def samples_of(path: Path, kind: str | None = None, variant: str | None = None) -> Samples:
    with Source(path) as source:
        return read(source, kind, variant)[2]


# ---- UCI HAR -----------------------------------------------------------------------------------------------


def test_uci_har_is_read_out_of_its_zip_in_a_zip(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", har_files(windows=3)).read_bytes()
    samples = samples_of(zipped(tmp_path / "outer.zip", {"UCI HAR Dataset.zip": inner, "UCI HAR Dataset.names": b""}))
    assert samples.x.shape == (18, 9, 128)
    assert samples.x.dtype == np.float32
    assert samples.client is not None
    assert samples.client.tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert [samples.classes[label] for label in samples.y[:6]] == ["WALKING"] * 3 + ["STANDING"] * 3
    assert samples.official_test is not None
    assert samples.official_test.tolist() == [False] * 12 + [True] * 6
    # Person 1, channel 0 (body_acc_x), activity 1: see `har_files`.
    assert samples.x[0, 0, :2] == pytest.approx([101, 101.0001])


def test_windows_of_uci_har_that_share_measurements_are_known(tmp_path: Path) -> None:
    samples = samples_of(laid_out(tmp_path, har_files(windows=3, root="UCI HAR Dataset")))
    assert samples.follows is not None
    assert samples.follows.tolist() == [False, True, True] * 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/y_train.txt", b"1\n2\n", "has 12 windows, but there are 2 labels and 12 people"),
        ("train/y_train.txt", b"7\n" * 12, "values beyond 1 to 6"),
        ("train/y_train.txt", b"1.5\n" * 12, "values beyond 1 to 6"),
        ("train/y_train.txt", b"", "it is empty"),
        ("test/subject_test.txt", b"nan\n" * 6, "values that are no numbers"),
        ("test/Inertial Signals/total_acc_z_test.txt", b"1 2 3\n" * 6, "3 columns"),
        ("test/Inertial Signals/total_acc_z_test.txt", b"\x80\x04 evil\n", "cannot be read"),
        ("test/Inertial Signals/total_acc_z_test.txt", None, r"no test/Inertial Signals/total_acc_z_test.txt in it"),
    ],
)
def test_a_damaged_uci_har_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    files = {**har_files(windows=3, root="set"), f"set/{name}": content}
    folder = laid_out(tmp_path / "har", {name: content for name, content in files.items() if content is not None})
    with pytest.raises(DataError, match=message) as refusal:
        samples_of(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


# ---- HAPT --------------------------------------------------------------------------------------------------


def test_hapt_is_cut_into_windows_of_each_segment_as_its_authors_did(tmp_path: Path) -> None:
    samples = samples_of(zipped(tmp_path / "HAPT Data Set.zip", hapt_files(people=2)))
    # 1280 samples hold 19 windows, 100 none, 1180 hold 17: (n - 128) // 64 + 1
    assert samples.y.tolist() == ([0] * 19 + [3] * 17) * 2
    assert samples.client is not None
    assert samples.client.tolist() == [1] * 36 + [2] * 36
    assert samples.official_test is not None
    assert samples.official_test.tolist() == [False] * 36 + [True] * 36  # person 2 is of the authors' test part
    assert samples.follows is not None
    assert samples.follows.tolist() == ([False] + [True] * 18 + [False] + [True] * 16) * 2
    assert np.array_equal(samples.x[1, :, :64], samples.x[0, :, 64:])


def test_hapt_gets_body_and_total_acceleration_by_the_published_filters(tmp_path: Path) -> None:
    rate, seconds = 50, 60
    t = np.arange(rate * seconds) / rate
    gravity, step, noise = 0.8, 0.3 * np.sin(2 * np.pi * 2 * t), 0.2 * np.sin(2 * np.pi * 24.5 * t)
    files = {
        "RawData/acc_exp01_user01.txt": _table(gravity + step + noise),
        "RawData/gyro_exp01_user01.txt": _table(noise),
        "RawData/labels.txt": f"1 1 5 1 {t.size}\n".encode(),
    }
    x = samples_of(laid_out(tmp_path, files)).x
    middle = x[len(x) // 2]
    start = len(x) // 2 * 64
    wave = step[start : start + 128]
    assert middle[0] == pytest.approx(wave, abs=0.05)  # body_acc_x: no gravity, no delay
    assert middle[6] == pytest.approx(wave + gravity, abs=0.05)  # total_acc_x
    assert np.abs(middle[3]).max() < 0.05  # body_gyro_x: above 20 Hz there is noise alone


def _table(values: np.ndarray) -> bytes:
    return "\n".join(f"{value} {value} {value}" for value in values).encode()


def test_the_low_pass_equals_scipys_filter_run_forwards_and_backwards() -> None:
    signal = pytest.importorskip("scipy.signal", reason="scipy is the reference of the filter")
    stream = np.random.default_rng(0).normal(size=(3000, 2)).cumsum(axis=0)
    b, a = signal.butter(3, 20 / 25)
    reference = signal.filtfilt(b, a, stream, axis=0)
    inside = slice(200, -200)  # the ends are padded otherwise
    assert np.abs(low_pass(stream, 20.0, 50.0) - reference)[inside].max() < 1e-6 * np.abs(stream).max()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"1 1 13 1 1000", "activity 13 from 1 to 1000"),
        (b"1 1 1 0 1000", "from 0 to 1000"),
        (b"1 1 1 1 1e300", "in recording 1 of 2560 samples"),
        (b"1 1 1 1000 1", "from 1000 to 1"),
        (b"1 1 1 1 100", "no labelled segment lasts 128 samples"),
        (b"1 1 1 1", "4 columns"),
    ],
)
def test_a_damaged_hapt_is_refused_in_one_line(tmp_path: Path, labels: bytes, message: str) -> None:
    files = {**hapt_files(people=1), "RawData/labels.txt": labels}
    with pytest.raises(DataError, match=message) as refusal:
        samples_of(laid_out(tmp_path, files))
    assert "\n" not in str(refusal.value)


def test_a_recording_without_its_gyroscope_is_named(tmp_path: Path) -> None:
    files = hapt_files(people=1)
    del files["RawData/gyro_exp01_user01.txt"]
    with pytest.raises(DataError, match=r"no gyro_exp01_user01\.txt in it"):
        samples_of(laid_out(tmp_path, files))


# ---- WISDM -------------------------------------------------------------------------------------------------

RAW = "WISDM_ar_v1.1/WISDM_ar_v1.1_raw.txt"


def wisdm(tmp_path: Path, text: str) -> Samples:
    return samples_of(tarred(tmp_path / "WISDM_ar_latest.tar.gz", {RAW: text.encode()}))


def test_wisdm_is_cut_into_windows_of_ten_seconds(tmp_path: Path) -> None:
    samples = wisdm(tmp_path, wisdm_text(33, "Jogging", 450) + wisdm_text(17, "Walking", 200))
    assert samples.x.shape == (4, 3, 200)
    assert samples.classes == ("Walking", "Jogging")
    assert samples.y.tolist() == [1, 1, 1, 0]
    assert samples.client is not None
    assert samples.client.tolist() == [33, 33, 33, 17]
    assert samples.follows is not None
    assert samples.follows.tolist() == [False, True, True, False]
    assert samples.x[1, :, 0] == pytest.approx([1.0, -1.5, 0.225])
    assert samples.notes == ()


def test_malformed_lines_of_wisdm_are_counted_and_left_out_and_doubled_ones_are_read(tmp_path: Path) -> None:
    whole = wisdm_text(11, "Walking", 200)
    first, rest = whole.split("\n", 1)
    second, rest = rest.split("\n", 1)
    odd = "\n".join(
        [
            f"{first}{second}",  # two records in one line
            second,  # the moment comes again
            second.replace("-1.5", "0"),  # and again, with other values
            "11,Walking,1867172313000,4.4,4.4,",  # no z, no end
            "11,Walking,1867222270000,;",
            "11,Walking,0,0,0,0;",  # lost
            "11,Walking,1867222270000,1.2.3,1,1;",
            "11,Walking,1867222270000,nan,1,1;",
            "11,Flying,1867222270000,1,1,1;",
            "",
        ]
    )
    rest = rest.replace(";", ",;").replace("Walking,", "Walking, ", 20)  # commas before the end, spaces: as in v1.1
    samples = wisdm(tmp_path, f"{odd}{rest}")
    assert len(samples.y) == 1
    assert samples.notes == ("8 of 208 records are not whole, or repeat a moment, and were left out",)


@pytest.mark.parametrize(
    "second",
    [
        wisdm_text(1, "Walking", 150, start=13_000_000_000),  # a pause
        wisdm_text(1, "Walking", 150, start=2_000_000_000),  # back in time
        wisdm_text(1, "Jogging", 150, start=8_550_000_000),
        wisdm_text(2, "Walking", 150, start=8_550_000_000),
    ],
)
def test_no_window_of_wisdm_spans_a_gap_another_activity_or_person(tmp_path: Path, second: str) -> None:
    with pytest.raises(DataError, match="no activity lasts 200 samples"):
        wisdm(tmp_path, wisdm_text(1, "Walking", 150) + second)


def test_a_file_of_digits_alone_does_not_keep_the_reader_busy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no activity lasts"):
        wisdm(tmp_path, "1" * 2_000_000 + ",a" * 100_000 + "1,Walking," + "9" * 1_000_000)


def uci_wisdm(sensor: str = "phone/accel") -> Files:
    device, kind = sensor.split("/")
    return {
        f"wisdm-dataset/raw/{sensor}/data_{person}_{kind}_{device}.txt": (
            wisdm_text(person, "A", 300) + wisdm_text(person, "S", 300)
        ).encode()
        for person in (1600, 1601)
    }


def test_the_uci_wisdm_has_a_variant_per_sensor(tmp_path: Path) -> None:
    samples = samples_of(zipped(tmp_path / "a.zip", {**uci_wisdm(), **uci_wisdm("watch/gyro")}), variant="watch-gyro")
    assert samples.classes == ("walking", "folding")
    assert samples.y.tolist() == [0, 0, 1, 1] * 2
    assert samples.client is not None
    assert sorted(set(samples.client.tolist())) == [1600, 1601]


def test_a_sensor_that_is_not_there_or_not_known_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", uci_wisdm())
    with pytest.raises(DataError, match="no raw/watch/accel in it; choose another --variant"):
        samples_of(path, variant="watch-accel")
    with pytest.raises(ConfigError, match="choose phone-accel, phone-gyro, watch-accel, watch-gyro"):
        samples_of(path, variant="shoe")
    (tmp_path / "WISDM_ar_v1.1_raw.txt").write_text(wisdm_text(1, "Walking", 300))
    with pytest.raises(DataError, match=r"WISDM v1.1 has no watch-gyro; leave --variant away"):
        samples_of(tmp_path / "WISDM_ar_v1.1_raw.txt", variant="watch-gyro")


# ---- which is which ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "files"), [("har", har_files), ("hapt", hapt_files), ("wisdm", uci_wisdm)])
def test_another_kind_than_the_archives_is_refused_and_the_archives_named(
    tmp_path: Path, kind: str, files: Callable[[], Files]
) -> None:
    path = laid_out(tmp_path, files())
    with pytest.raises(DataError, match=f"no CIFAR-10's data_batch_1.bin in it; it looks like --kind {kind}"):
        samples_of(path, kind="cifar10")
    assert len(samples_of(path, kind=kind).y)


def test_what_is_none_of_them_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    path = laid_out(tmp_path, {"holiday.jpg": b"", "notes.txt": b""})
    with pytest.raises(DataError, match=r"it holds holiday\.jpg, notes\.txt, which is none of har, hapt, wisdm"):
        samples_of(path)
    with pytest.raises(DataError, match=r"in it; it holds holiday\.jpg, notes\.txt"):
        samples_of(path, kind="har")
    with pytest.raises(ConfigError, match="--kind imagenet: no such kind; choose har, hapt"):
        samples_of(path, kind="imagenet")


def test_two_sets_in_one_folder_ask_for_the_kind(tmp_path: Path) -> None:
    path = laid_out(tmp_path, {**hapt_files(people=1), **uci_wisdm()})
    with pytest.raises(DataError, match="it may be hapt or wisdm; choose with --kind"):
        samples_of(path)
    assert samples_of(path, kind="wisdm").x.shape[1:] == (3, 200)
