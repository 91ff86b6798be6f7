"""Settings: file, then environment, then options; every mistake is one line that names place and remedy."""

import os
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from fedeq_edge import settings
from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.deq.spec import published
from fedeq_edge.errors import ConfigError
from fedeq_edge.gateway import federation_of
from fedeq_edge.serving.address import Address
from fedeq_edge.settings import AgentSettings, AggregatorSettings, BrokerSettings

AGENT = 'device = "pi"\nfederation = "farm"\ndata = "data.npz"\n'
AGGREGATOR = """
federation = "farm"
seed = 3
[model]
input_shape = [64]
classes = 10
[train]
rounds = 7
[method]
preset = "fedprox"
rho = 0.5
[schedule]
min_devices = 2
deadline_s = 42.5
[broker]
url = "mqtts://gateway:8883"
ca = "ca.pem"
"""


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def refusal(path: Path, kind: type[Any] = AgentSettings, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        settings.load(path, kind, options=options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_read_and_the_rest_has_defaults(tmp_path: Path) -> None:
    agent = settings.load(written(tmp_path, AGENT), AgentSettings)
    assert agent == AgentSettings(device="pi", federation="farm", data="data.npz")
    assert agent.broker == BrokerSettings()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.toml does not exist; name another with --config" in refusal(tmp_path / "nowhere.toml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'device = "\xe9"')
    assert "latin.toml cannot be read" in refusal(tmp_path / "latin.toml")
    assert "cannot be read" in refusal(tmp_path)


def test_bad_toml_is_named_with_its_line(tmp_path: Path) -> None:
    assert "is not TOML" in refusal(written(tmp_path, AGENT + "state = \n"))
    assert "line 4" in refusal(written(tmp_path, AGENT + "state = \n"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (AGENT + 'devise = "x"\n', "unknown key 'devise'; did you mean 'device'?"),
        (AGENT + '[broker]\nurI = "x"\n', "[broker]: unknown key 'urI'; did you mean 'url'?"),
        (AGENT + "[brokers]\n", "unknown key 'brokers'; did you mean 'broker'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(text: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(written(tmp_path, text))


def test_an_unknown_key_of_model_train_and_schedule_is_named_with_its_table(tmp_path: Path) -> None:
    for table, key in (("model", "klasses"), ("train", "epoch"), ("schedule", "deadline")):
        text = AGGREGATOR.replace(f"[{table}]\n", f"[{table}]\n{key} = 1\n")
        assert f"[{table}]: unknown key '{key}'; did you mean" in refusal(written(tmp_path, text), AggregatorSettings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('federation = "farm"\ndata = "d"\n', "device is missing; add it"),
        (AGENT.replace('"pi"', '"Pi 4"'), "device 'Pi 4' cannot stand in a topic"),
        (AGENT.replace('"farm"', '"a/b"'), "federation 'a/b' cannot stand in a topic"),
        (AGENT + 'emulate = "yes"\n', "$.emulate"),
        (AGENT + "trainer_idle_s = true\n", "$.trainer_idle_s"),
        (AGENT + "broker = 5\n", "$.broker"),
        (AGENT + '[broker]\nversion = "4"\n', "$.broker.version"),
    ],
)
def test_a_bad_value_is_named_by_its_place(text: str, told: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path, text))
    assert told in message
    assert "settings.toml" in message


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("min_devices = 2", "min_devices = 0", "schedule.min_devices is 0; give at least 1"),
        ("deadline_s = 42.5", "deadline_s = -1", "schedule.deadline_s is -1"),
        ("seed = 3", 'seed = 3\ncodec = "int3"', "int3"),
        ("classes = 10", "classes = 1.5", "$.model.classes"),
    ],
)
def test_what_a_table_itself_refuses_is_said_in_its_words(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(written(tmp_path, AGGREGATOR.replace(old, new)), AggregatorSettings)


def test_the_environment_goes_over_the_file_and_options_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, AGENT + '[broker]\nurl = "mqtt://file"\nca = "file.pem"\n')
    monkeypatch.setenv("FEDEQ_BROKER__URL", "mqtt://environment")
    monkeypatch.setenv("FEDEQ_DEVICE", "env-1")
    loaded = settings.load(path, AgentSettings, options={"device": "option-1"})
    assert (loaded.device, loaded.broker.url, loaded.broker.ca) == ("option-1", "mqtt://environment", "file.pem")


def test_the_environment_has_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDEQ_TRAINER_IDLE_S", "2.5")
    monkeypatch.setenv("FEDEQ_EMULATE", "true")
    monkeypatch.setenv("FEDEQ_PROFILE", "pi-zero-2")
    loaded = settings.load(written(tmp_path, AGENT), AgentSettings)
    assert (loaded.trainer_idle_s, loaded.emulate, loaded.profile) == (2.5, True, "pi-zero-2")


def test_a_text_that_looks_like_a_number_stays_a_text_where_one_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDEQ_DEVICE", "17")
    monkeypatch.setenv("FEDEQ_BROKER__VERSION", "5")
    loaded = settings.load(written(tmp_path, AGENT), AgentSettings)
    assert (loaded.device, loaded.broker.version) == ("17", "5")


def test_a_misspelt_key_in_the_environment_is_refused_within_a_known_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDEQ_BROKER__ULR", "mqtt://x")
    assert "[broker]: unknown key 'ulr'; did you mean 'url'?" in refusal(written(tmp_path, AGENT))


def test_a_table_and_its_key_may_both_stand_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDEQ_BROKER", "mqtt://x")
    monkeypatch.setenv("FEDEQ_BROKER__URL", "mqtt://y")
    assert "broker" in refusal(written(tmp_path, AGENT))


def test_variables_of_other_programs_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDEQ_BENCH_OUT", "x")
    monkeypatch.setenv("DEVICE", "x")
    assert settings.load(written(tmp_path, AGENT), AgentSettings).device == "pi"


def test_a_list_in_the_environment_replaces_the_one_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDEQ_TRAIN__BUDGETS", "[2, 4]")
    assert settings.load(written(tmp_path, AGGREGATOR), AggregatorSettings).train.budgets == (2, 4)


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "etc" / "agent.toml"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert settings.resolve(path, "state") == tmp_path / "etc" / "state"
    assert settings.resolve(path, "../data.npz") == tmp_path / "data.npz"
    assert settings.resolve(path, str(tmp_path / "x")) == tmp_path / "x"
    assert settings.resolve(path, "~/x") == tmp_path / "home" / "x"


def test_settings_written_as_toml_are_read_as_they_were(tmp_path: Path) -> None:
    chosen = settings.load(written(tmp_path, AGGREGATOR), AggregatorSettings)
    path = tmp_path / "again.toml"
    path.write_text(settings.to_toml(chosen))
    assert settings.load(path, AggregatorSettings) == chosen
    assert chosen.broker.ca == "ca.pem"


def test_a_table_that_may_be_left_out_is_read_checked_and_set_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = AGGREGATOR + "[privacy]\nclip = 0.5\nnoise_multiplier = 1.1\n"
    monkeypatch.setenv("FEDEQ_PRIVACY__DELTA", "1e-6")
    loaded = settings.load(written(tmp_path, private), AggregatorSettings)
    assert loaded.privacy == Privacy(clip=0.5, noise_multiplier=1.1, delta=1e-6)
    assert settings.load(written(tmp_path, settings.to_toml(loaded)), AggregatorSettings) == loaded
    monkeypatch.delenv("FEDEQ_PRIVACY__DELTA")
    told = refusal(written(tmp_path, private.replace("clip", "clp")), AggregatorSettings)
    assert "[privacy]: unknown key 'clp'; did you mean 'clip'?" in told
    assert "privacy: clip is -0.5" in refusal(
        written(tmp_path, private.replace("0.5\nnoise", "-0.5\nnoise")), AggregatorSettings
    )


def test_a_method_is_a_preset_with_the_changes_of_the_file(tmp_path: Path) -> None:
    chosen = settings.load(written(tmp_path, AGGREGATOR), AggregatorSettings)
    assert chosen.resolved_method() == msgspec.structs.replace(METHODS["fedprox"], rho=0.5)
    without = settings.load(written(tmp_path, AGGREGATOR.split("[method]", maxsplit=1)[0]), AggregatorSettings)
    assert without.resolved_method() == METHODS["admm"]


@pytest.mark.parametrize(
    ("schedule", "alone"),
    [({}, 7), ({"fraction": 0.3}, 2), ({"fraction": 0.01}, 1), ({"mode": "async"}, 4)],
)
def test_devices_are_told_how_long_a_model_trains_alone(schedule: dict[str, Any], alone: int, tmp_path: Path) -> None:
    options = {"schedule": schedule}
    chosen = settings.load(written(tmp_path, AGGREGATOR), AggregatorSettings, options=options)
    assert federation_of(chosen).plan["alone_rounds"] == alone
    options["train"] = {"alone_rounds": 5}
    chosen = settings.load(written(tmp_path, AGGREGATOR), AggregatorSettings, options=options)
    assert federation_of(chosen).plan["alone_rounds"] == 5


@pytest.mark.parametrize(("size", "most"), [("S", 8), ("M", 4)])
def test_devices_are_told_how_many_samples_to_differentiate_at_once(size: Literal["S", "M"], most: int) -> None:
    model = published((3, 32, 32), 10, size)
    assert federation_of(AggregatorSettings(federation="plant", model=model)).plan["microbatch"] == most


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"preset": "fedpox"}, "fedprox"),
        ({"preset": 5}, "no method '5'"),
        ({"roh": 1.0}, "method: unknown key 'roh'; did you mean 'rho'?"),
        ({"rho": -1.0}, "rho is -1.0; give a finite number above 0"),
        ({"server": "best"}, "$.server"),
        ({"rho": "much"}, "$.rho"),
    ],
)
def test_a_method_that_cannot_be_is_refused(method: dict[str, Any], told: str, tmp_path: Path) -> None:
    chosen = settings.load(written(tmp_path, AGGREGATOR), AggregatorSettings, options={"method": method})
    with pytest.raises(ConfigError) as caught:
        chosen.resolved_method()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "gateway", "http://gateway", "mqtt://", "mqtt://gateway:port", "mqtt://g:99999"])
def test_an_url_that_is_no_brokers_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        BrokerSettings(url=url).endpoint(Path("agent.toml"))


def test_pem_files_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    chosen = BrokerSettings(ca="ca.crt", certificate="/etc/own.crt").endpoint(tmp_path / "agent.toml")
    assert (chosen.ca, chosen.certificate, chosen.key) == (str(tmp_path / "ca.crt"), "/etc/own.crt", None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('workers = ["farm-0"]\nroot = "all"\n', "one or the other"),
        ('workers = ["Farm 0"]\n', "worker 'Farm 0'"),
        ('root = "all"\naudit = true\n', "audit"),
        ('root = "all"\nmethod = {preset = "fedprox", robust = "median"}\n', "robust"),
        ('root = "all"\nmethod = {preset = "local"}\n', "method local"),
        ('root = "all"\nschedule = {mode = "async"}\n', "async"),
        ('root = "all"\nprivacy = {clip = 1.0, noise_multiplier = 1.0}\n', "without noise"),
    ],
)
def test_what_a_root_and_its_workers_cannot_do_is_refused(tmp_path: Path, change: str, named: str) -> None:
    path = written(tmp_path, f'federation = "farm"\n{change}[model]\ninput_shape = [64]\nclasses = 10\n')
    assert named in refusal(path, AggregatorSettings)


def test_a_device_goes_to_the_worker_that_its_id_hashes_to(tmp_path: Path) -> None:
    """The numbers are for ever: a device that moved would leave its dual behind."""
    path = written(tmp_path, f"{AGENT}workers = 3\n")
    devices = ("pi", "pi-2", "pi-3")
    found = {device: settings.load(path, AgentSettings, options={"device": device}).joins for device in devices}
    assert found == {"pi": "farm-1", "pi-2": "farm-1", "pi-3": "farm-0"}


def test_a_device_of_a_federation_without_workers_joins_that(tmp_path: Path) -> None:
    assert settings.load(written(tmp_path, AGENT), AgentSettings).joins == "farm"


def test_a_place_to_ask_is_relative_to_its_file_and_nowhere_by_default(tmp_path: Path) -> None:
    path = written(tmp_path, AGENT + 'serve = "infer.sock"\n')
    assert settings.load(path, AgentSettings).answers_at(path) == Address(tmp_path / "infer.sock", None)
    options = {"serve": "127.0.0.1:8471"}
    assert settings.load(path, AgentSettings, options=options).answers_at(path) == Address(None, 8471)
    path = written(tmp_path, AGENT)
    assert settings.load(path, AgentSettings).answers_at(path) is None


def test_a_place_on_the_network_is_refused(tmp_path: Path) -> None:
    assert "stay on this device" in refusal(written(tmp_path, AGENT + 'serve = "0.0.0.0:80"\n'))
