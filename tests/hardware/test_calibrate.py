"""Calibration recovers the cost of a step from timings, whatever clock it is given."""

import pytest

from fedeq_edge.hardware.calibrate import calibrate
from fedeq_edge.hardware.clock import DeviceClock


class Bench:
    """A clock and a step that takes exactly what it is told; the first call of each kind pays a warm-up."""

    def __init__(self, fixed: float, evaluation: float, adjoint: float) -> None:
        self.now = 0.0
        self.cost = (fixed, evaluation, adjoint)
        self.calls: list[tuple[int, int]] = []

    def step(self, K: int, k: int) -> None:
        fixed, evaluation, adjoint = self.cost
        warm_up = 5.0 if (K, k) not in self.calls else 0.0
        self.calls.append((K, k))
        self.now += fixed + K * evaluation + k * adjoint + warm_up

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("budgets", [(2, 3, 4, 6, 8, 12), (4, 2), (3,)])
def test_the_three_costs_are_recovered(budgets: tuple[int, ...]) -> None:
    bench = Bench(0.004, 0.001, 0.0025)

    cost = calibrate(bench.step, 16, budgets, clock=bench.clock, limit_s=0.01)

    assert cost.batch == 16
    assert cost.fixed_s == pytest.approx(0.004)
    assert cost.evaluation_s == pytest.approx(0.001)
    assert cost.adjoint_s == pytest.approx(0.0025)


def test_costs_are_never_negative() -> None:
    bench = Bench(0.01, 0.001, -0.0005)  # noise can make adjoint terms look profitable

    cost = calibrate(bench.step, 16, (2, 4, 8), clock=bench.clock, limit_s=0.01)

    assert min(cost.fixed_s, cost.evaluation_s, cost.adjoint_s) >= 0


def test_one_sweep_is_completed_however_short_the_limit() -> None:
    bench = Bench(0.01, 0.001, 0.001)

    calibrate(bench.step, 16, (2, 4, 8), clock=bench.clock, limit_s=0.0)

    assert len(bench.calls) == 12  # six points: warm-up, then measured once


def test_an_emulated_device_reports_its_slowdown() -> None:
    cost = calibrate(lambda K, k: None, 4, (1, 2), clock=DeviceClock(slowdown=25.0), limit_s=0.0)

    assert cost.slowdown == 25.0


def test_an_emulated_clock_counts_computing_and_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.process_time", lambda: 2.0)
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)

    assert DeviceClock()() == 100.0
    assert DeviceClock(slowdown=25.0)() == 50.0
    assert DeviceClock(shared=True)() == 2.0


def test_a_clock_cannot_run_backwards() -> None:
    with pytest.raises(ValueError, match="slowdown"):
        DeviceClock(slowdown=0.0)
