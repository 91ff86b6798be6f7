"""The probe reads the tree that it is given and survives whatever a driver wrote there."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedeq_edge.hardware.cgroup import limits
from fedeq_edge.hardware.probe import Probe, probe
from fedeq_edge.hardware.reading import Battery, Reading, read

GIB = 1 << 30

PI4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/cpuinfo": "".join(
        f"processor\t: {i}\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\n" for i in range(4)
    )
    + "Hardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
    "proc/meminfo": "MemTotal:        3884096 kB\nMemFree:  1 kB\nMemAvailable:    3000000 kB\n",
    "proc/loadavg": "0.52 0.30 0.10 1/123 456\n",
    "proc/self/status": "Name:\tpython\nCpus_allowed:\tf\nCpus_allowed_list:\t0-3\n",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61342\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_raspberry_pi_is_described(tmp_path: Path) -> None:
    found = probe(tree(tmp_path, PI4))

    assert found.model == "Raspberry Pi 4 Model B Rev 1.4"
    assert (found.cpu_part, found.cpu_core) == ("0xd08", "Cortex-A72")
    assert (found.cores_logical, found.cores_physical, found.affinity) == (4, 4, (0, 1, 2, 3))
    assert found.memory_total_bytes == 3884096 * 1024
    assert found.os == "Debian GNU/Linux 12 (bookworm)"
    assert found.reading.temperature_c == pytest.approx(61.342)
    assert found.reading.throttled == ("under-voltage", "throttled")
    assert found.reading.load == 0.52
    assert (found.effective_cores, found.effective_memory_bytes) == (4.0, 3884096 * 1024)


def test_two_threads_of_one_core_are_one_physical_core(tmp_path: Path) -> None:
    blocks = "".join(f"processor : {i}\nmodel name : Xeon\nphysical id : 0\ncore id : {i % 2}\n\n" for i in range(4))

    found = probe(tree(tmp_path, {"proc/cpuinfo": blocks}))

    assert (found.cores_logical, found.cores_physical, found.cpu_model) == (4, 2, "Xeon")


def test_a_container_sees_its_version_2_limits(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/fedeq.service"
    files = PI4 | {
        "proc/self/cgroup": "0::/system.slice/fedeq.service\n",
        f"{group}/cpu.max": "150000 100000\n",
        f"{group}/memory.max": "max\n",
        "sys/fs/cgroup/system.slice/memory.max": f"{GIB}\n",  # a limit of the parent binds as well
    }

    found = probe(tree(tmp_path, files))

    assert (found.cgroup_cpus, found.effective_cores) == (1.5, 1.5)
    assert (found.cgroup_memory_bytes, found.effective_memory_bytes) == (GIB, GIB)


def test_a_container_sees_its_version_1_limits_below_a_host_path(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "25000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB // 2),
    }

    found = limits(tree(tmp_path, files))

    assert (found.cpus, found.memory_bytes) == (0.25, GIB // 2)


def test_no_limit_is_no_number(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n1:cpu:/\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }

    found = limits(tree(tmp_path, files))

    assert (found.cpus, found.memory_bytes) == (None, None)


def test_affinity_below_the_number_of_cores_counts(tmp_path: Path) -> None:
    found = probe(tree(tmp_path, PI4 | {"proc/self/status": "Cpus_allowed_list:\t0,2-3\n"}))

    assert found.affinity == (0, 2, 3)
    assert found.effective_cores == 3.0


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({"BAT0/type": "Battery", "BAT0/capacity": "42", "AC/type": "Mains", "AC/online": "0"}, (42.0, False)),
        ({"BAT0/type": "Battery", "BAT0/capacity": "42", "AC/type": "Mains", "AC/online": "1"}, (42.0, True)),
        ({"ups/type": "Battery", "ups/capacity": "7", "ups/status": "Charging"}, (7.0, True)),
        ({"ups/type": "Battery", "ups/capacity": "400", "ups/status": "Discharging"}, (100.0, False)),
        ({"mouse/type": "Battery", "mouse/scope": "Device", "mouse/capacity": "3"}, None),
        ({"AC/type": "Mains", "AC/online": "1"}, None),
    ],
)
def test_the_battery_is_ours_and_knows_whether_it_is_fed(
    tmp_path: Path, supplies: dict[str, str], expected: tuple[float, bool] | None
) -> None:
    files = {f"sys/class/power_supply/{name}": f"{text}\n" for name, text in supplies.items()}

    battery = read(tree(tmp_path, files)).battery

    assert battery == (None if expected is None else Battery(percent=expected[0], plugged=expected[1]))


def test_the_processor_is_preferred_to_a_hotter_radio(tmp_path: Path) -> None:
    zones = {
        "sys/class/thermal/thermal_zone0/type": "wifi",
        "sys/class/thermal/thermal_zone0/temp": "90000",
        "sys/class/hwmon/hwmon0/name": "k10temp",
        "sys/class/hwmon/hwmon0/temp1_input": "55000",
    }

    assert read(tree(tmp_path, zones)).temperature_c == 55.0


def test_a_disconnected_sensor_is_no_temperature(tmp_path: Path) -> None:
    zones = {
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "-273150",
    }

    assert read(tree(tmp_path, zones)).temperature_c is None


def test_an_empty_tree_is_all_unknown(tmp_path: Path) -> None:
    assert read(tmp_path) == Reading()
    assert probe(tmp_path).effective_cores >= 1  # psutil answers instead


def test_folders_where_files_should_be_are_survived(tmp_path: Path) -> None:
    for name in PI4:
        (tmp_path / name).mkdir(parents=True)

    assert read(tmp_path) == Reading()
    assert probe(tmp_path).model is None


GARBAGE_PATHS = [
    *PI4,
    "proc/self/cgroup",
    "sys/fs/cgroup/cpu.max",
    "sys/fs/cgroup/memory.max",
    "sys/class/power_supply/BAT0/type",
    "sys/class/power_supply/BAT0/capacity",
]


@given(text=st.sampled_from(["", "nan", "inf 0", "-1 0", "0", "0x", "::", "processor:", "1e400", "é\0\ud7ff"]))
def test_garbage_in_any_file_is_unknown_and_never_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    root = tree(tmp_path_factory.mktemp("root"), dict.fromkeys(GARBAGE_PATHS, text))

    found = probe(root)

    assert found.effective_cores > 0
    assert found.effective_memory_bytes > 0


def test_this_machine_is_described_and_travels_as_json() -> None:
    found = probe()

    assert found.cores_logical >= 1
    assert found.memory_total_bytes >= found.memory_available_bytes > 0
    assert msgspec.json.decode(msgspec.json.encode(found), type=Probe) == found
