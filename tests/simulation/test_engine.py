"""The engine: the machines of the protocol in virtual time, on solves in closed form."""

from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.errors import StateError
from fedeq_edge.simulation.engine import Simulation
from tests.protocol.fleet import Quadratics
from tests.simulation.quadratic_runs import Line, Solver, experiment, live, scenario, simulate

DEVICES = 8
SIZE_BYTES = 12 * 4  # of a difference


def of_kind(lines: list[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_a_simulated_fleet_comes_to_the_bits_of_one_whose_clients_keep_their_own_vectors(
    fraction: float, tmp_path: Path
) -> None:
    made = scenario(DEVICES, experiment(schedule={"fraction": fraction}))
    fleet = live(DEVICES, made.federation)
    fleet.run()
    found: dict[str, object] = {}

    def watch(run: Simulation, line: Line) -> None:
        if line["kind"] == "round":
            found["z"] = run.aggregator.consensus.z_hat
            found["nu"] = {name: run.duals.get(name) for name in run.devices}

    simulate(made, Solver(Quadratics.drawn(DEVICES)), tmp_path, watch)
    np.testing.assert_array_equal(found["z"], fleet.aggregator.consensus.z_hat)
    for name, nu in found["nu"].items():  # type: ignore[attr-defined]
        np.testing.assert_array_equal(nu, fleet.duals.get(name))
        held = fleet.devices[name].client.state.nu
        np.testing.assert_array_equal(nu, held if held.size else np.zeros_like(nu))


def test_a_client_that_is_not_at_work_holds_no_vector_but_the_consensus_of_all(tmp_path: Path) -> None:
    def watch(run: Simulation, line: Line) -> None:
        if line["kind"] == "evaluation":
            states = [device.client.state for device in run.devices.values()]
            assert all(state.nu.size == 0 and state.head.size == 0 for state in states)
            assert sum(state.pending is not None for state in states) <= 1  # whose verdict is on its way
            assert len({id(state.z) for state in states}) == 1
            assert any(run.duals.get(name).any() for name in run.devices)

    lines = simulate(scenario(DEVICES, experiment()), Solver(Quadratics.drawn(DEVICES)), tmp_path, watch)
    assert len(of_kind(lines, "evaluation")) == 2


def test_a_run_converges_to_the_optimum(tmp_path: Path) -> None:
    problem = Quadratics.drawn(DEVICES)
    last: list[np.ndarray] = []
    made = scenario(DEVICES, experiment(train={"rounds": 60}, evaluation={"every": 0}))
    simulate(made, Solver(problem), tmp_path, lambda run, _: last.append(run.aggregator.consensus.z_hat))
    assert np.abs(last[-1] - problem.optimum()).max() < 1e-4


def test_two_runs_of_the_same_say_the_same(tmp_path: Path) -> None:
    chosen = experiment(
        fleet={"groups": [{"dropout": 0.3, "straggle": 0.4, "up_mbit": 1.0}]}, schedule={"fraction": 0.6, "quorum": 0.2}
    )
    first, second = (simulate(scenario(DEVICES, chosen), Solver(Quadratics.drawn(DEVICES)), tmp_path) for _ in range(2))
    assert first == second


def test_a_round_waits_for_its_slowest_device_and_its_link(tmp_path: Path) -> None:
    chosen = experiment(fleet={"groups": [{"up_mbit": 0.008, "latency_ms": 500.0}]})
    lines = simulate(scenario(2, chosen), Solver(Quadratics.drawn(2), seconds=3.0), tmp_path)
    seconds = of_kind(lines, "round")[-1]["seconds"]
    assert 4.0 + SIZE_BYTES / 1000.0 < seconds < 5.0 + SIZE_BYTES / 1000.0  # 1 kB a second goes up


def test_a_straggler_misses_the_deadline_and_counts_as_late(tmp_path: Path) -> None:
    chosen = experiment(
        fleet={"groups": [{"straggle": 0.5, "straggle_factor": 5.0}]}, schedule={"quorum": 0.1, "deadline_s": 20.0}
    )
    rounds = of_kind(simulate(scenario(DEVICES, chosen), Solver(Quadratics.drawn(DEVICES)), tmp_path), "round")
    assert all(line["seconds"] % 20.0 == 0.0 for line in rounds if line["contributed"] - line["late"] < line["cohort"])
    assert any(line["late"] for line in rounds)


def test_who_drops_out_is_missed_until_the_deadline_and_comes_back(tmp_path: Path) -> None:
    chosen = experiment(fleet={"groups": [{"dropout": 0.3}]}, schedule={"quorum": 0.2})
    lines = simulate(scenario(DEVICES, chosen), Solver(Quadratics.drawn(DEVICES)), tmp_path)
    rounds = of_kind(lines, "round")
    assert any(line["contributed"] < line["cohort"] and line["seconds"] == 40.0 for line in rounds)
    assert all(line["rounds"] > 0 for line in of_kind(lines, "client"))


def test_a_fleet_that_is_always_away_is_told_of(tmp_path: Path) -> None:
    chosen = experiment(fleet={"groups": [{"dropout": 0.999999}]})
    with pytest.raises(StateError, match="lower dropout"):
        simulate(scenario(2, chosen), Solver(Quadratics.drawn(2)), tmp_path)


def test_devices_in_async_mode_are_asked_as_they_come(tmp_path: Path) -> None:
    chosen = experiment(schedule={"mode": "async", "buffer": 2}, fleet={"groups": [{"straggle": 0.5}]})
    rounds = of_kind(simulate(scenario(DEVICES, chosen), Solver(Quadratics.drawn(DEVICES)), tmp_path), "round")
    assert len(rounds) == 6
    assert all(line["contributed"] == 2 for line in rounds[1:])


def test_bytes_are_those_of_every_message_with_its_header(tmp_path: Path) -> None:
    lines = simulate(scenario(2, experiment()), Solver(Quadratics.drawn(2)), tmp_path)
    rounds, clients = of_kind(lines, "round"), of_kind(lines, "client")
    for direction in ("bytes_up", "bytes_down"):
        assert sum(line[direction] for line in rounds) <= sum(line[direction] for line in clients)
        assert all(line[direction] > 2 * SIZE_BYTES for line in rounds)
