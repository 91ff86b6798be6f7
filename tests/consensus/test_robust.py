"""Sixteen devices, four of which lie: with a robust method z stays near the optimum of the honest, without it does not.

Distances are to the optimum of the honest twelve. AWAY is how far from it they start, SPREAD how far their own optima
lie from it on average: less than that is what "near" can mean in a fleet of different devices.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedeq_edge.consensus import robust
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.fixed import WHOLE, FixedVector, FloatVector, dual_step, scaled
from fedeq_edge.consensus.methods import Method, method
from fedeq_edge.errors import ConfigError, ContributionError

Array = NDArray[np.float64]
Lie = Callable[[Array, np.random.Generator], Array]
SIZE, DEVICES, LIARS = 20, 16, 4
NAMES = tuple(f"pi-{i:02}" for i in range(DEVICES))


def problems() -> tuple[Array, Array]:
    """(16, 20, 20) and (16, 20) of alike quadratics theta' Q theta / 2 - b' theta."""
    rng = np.random.default_rng(0)
    M = rng.normal(size=(DEVICES + 1, SIZE, SIZE))
    curvatures = np.einsum("nij,nkj->nik", M, M) / SIZE
    Q = 0.5 * curvatures[0] + np.eye(SIZE) + 0.3 * curvatures[1:]
    b = 2.0 * rng.normal(size=SIZE) + 0.3 * rng.normal(size=(DEVICES, SIZE))
    return Q, b


Q, B = problems()
HONEST = np.linalg.solve(Q[LIARS:].sum(axis=0), B[LIARS:].sum(axis=0))
AWAY = float(np.linalg.norm(HONEST))  # 6.6
SPREAD = float(np.mean([np.linalg.norm(np.linalg.solve(Q[i], B[i]) - HONEST) for i in range(LIARS, DEVICES)]))  # 1.4
PUSH = np.random.default_rng(3).normal(size=SIZE)
PUSH *= 0.4 / np.linalg.norm(PUSH)

LIES: dict[str, Lie] = {
    "flipped and ten times as long": lambda d, rng: -10.0 * d,
    "flipped": lambda d, rng: -d,
    "large and constant": lambda d, rng: np.full(SIZE, 5.0),
    "random": lambda d, rng: 3.0 * rng.normal(size=SIZE),
    "a small push together": lambda d, rng: PUSH,
}


def admm(**changes: Any) -> Method:
    return msgspec.structs.replace(method("admm"), rho=1.0, quality="uniform", **changes)


def averaging(**changes: Any) -> Method:
    return msgspec.structs.replace(method("fedprox"), rho=1.0, quality="uniform", **changes)


@dataclass
class Fleet:
    """Exact clients under ADMM, one gradient step otherwise; the first four send `lie(d)`."""

    method: Method
    lie: Lie
    refused: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.consensus = Consensus(np.zeros(SIZE, np.float32), method=self.method)
        self.nu: dict[str, FixedVector] = {name: np.zeros(SIZE, np.int64) for name in NAMES}
        self.rng = np.random.default_rng(1)
        for name in NAMES:
            self.consensus.join(name, 1)

    def play(self, rounds: int) -> "Fleet":
        for _ in range(rounds):
            self.consensus.open_round(NAMES)
            z = self.consensus.z_hat.astype(np.float64)
            arrived = [(name, self._difference(i, name, z)) for i, name in enumerate(NAMES)]
            taken = [entry for entry in arrived if self._accepted(*entry)]
            self.consensus.close_round(contributions=lambda taken=taken: taken)  # type: ignore[misc]  # bound here
        return self

    @property
    def distance(self) -> float:
        return float(np.linalg.norm(self.consensus.z - HONEST))

    def _difference(self, i: int, name: str, z: Array) -> FloatVector:
        if self.method.server == "fresh":
            right = B[i] - self.nu[name] * 2.0**-32 + z
            difference = np.linalg.solve(Q[i] + np.eye(SIZE), right) - z
        else:
            difference = -0.3 * (Q[i] @ z - B[i])
        return (self.lie(difference, self.rng) if i < LIARS else difference).astype(np.float32)

    def _accepted(self, name: str, difference: FloatVector) -> bool:
        try:
            factor = self.consensus.accept(name, difference, 1.0)
        except ContributionError as refusal:
            self.refused.setdefault(refusal.code, []).append(name)
            return False
        self.nu[name] = self.nu[name] + dual_step(scaled(difference, factor), 1.0, 32)
        return True


@pytest.mark.parametrize("lie", LIES)
def test_clipping_bounds_what_liars_do_to_the_duals(lie: str) -> None:
    assert Fleet(admm(robust="clip"), LIES[lie]).play(100).distance < AWAY / 2
    assert Fleet(admm(), LIES[lie]).play(100).distance > AWAY


@pytest.mark.parametrize("changes", [{"robust": "clip"}, {"robust": "trimmed"}, {"robust": "median"}], ids=str)
@pytest.mark.parametrize("lie", ["flipped and ten times as long", "large and constant", "random"])
def test_the_mean_of_a_robust_server_stays_near_the_honest_optimum(lie: str, changes: dict[str, str]) -> None:
    assert Fleet(averaging(**changes), LIES[lie]).play(100).distance < SPREAD
    assert Fleet(averaging(), LIES[lie]).play(100).distance > SPREAD


@pytest.mark.parametrize("lie", ["flipped and ten times as long", "large and constant", "random"])
def test_a_norm_limit_refuses_large_lies_and_leaves_the_rest_alone(lie: str) -> None:
    fleet = Fleet(averaging(norm_limit=3.0), LIES[lie]).play(60)
    assert fleet.distance < 1e-2
    assert set(fleet.refused) == {"norm_bound"}
    assert set(fleet.refused["norm_bound"]) == set(NAMES[:LIARS])


def test_a_clipped_honest_fleet_ends_near_its_optimum_and_not_at_it() -> None:
    """The bound shrinks with most devices, so the few that have farther to go never arrive: the price of the bound."""
    optimum = np.linalg.solve(Q.sum(axis=0), B.sum(axis=0))
    ends = [Fleet(admm(**changes), lambda d, rng: d).play(100).consensus.z for changes in ({}, {"robust": "clip"})]
    assert np.linalg.norm(ends[0] - optimum) < 1e-6
    assert 1e-3 < np.linalg.norm(ends[1] - optimum) < 0.05


def test_both_sides_move_the_dual_by_the_same_clipped_difference() -> None:
    fleet = Fleet(admm(robust="clip"), LIES["random"]).play(20)
    H = sum((fleet.nu[name] for name in NAMES), np.zeros(SIZE, np.int64))
    assert (fleet.consensus.sums[0] == H).all()
    assert (fleet.consensus.recomputed()[0] == H).all()


# ---- the bounds themselves ---------------------------------------------------------------------------------


def server(changes: dict[str, Any], norms: list[float]) -> Consensus:
    """A fleet of eight whose first round had these norms."""
    consensus = Consensus(np.zeros(4, np.float32), method=averaging(**changes))
    for name in NAMES[:8]:
        consensus.join(name, 1)
    consensus.open_round(NAMES[:8])
    for name, norm in zip(NAMES[:8], norms, strict=True):
        assert consensus.accept(name, vector(norm), 1.0) == (WHOLE if "min_cosine" in changes else 0)
    consensus.close_round()
    return consensus


def vector(norm: float) -> FloatVector:
    return np.array([norm, 0.0, 0.0, 0.0], np.float32)


def test_the_first_round_only_measures() -> None:
    consensus = server({"robust": "clip"}, [1.0] * 6 + [1e6] * 2)
    assert (consensus.z == 0.0).all()
    assert consensus.accept("pi-00", vector(0.5), 1.0) == WHOLE
    assert consensus.accept("pi-01", vector(2.0), 1.0) == WHOLE // 4
    assert consensus.accept("pi-02", vector(1e6), 1.0) == 0


def test_a_bound_does_not_move_while_a_round_is_open() -> None:
    consensus = server({"robust": "clip", "clip": 1.0}, [1.0] * 8)
    factors = {consensus.accept(name, vector(norm), 1.0) for name, norm in zip(NAMES, [8.0] * 7 + [8.0], strict=False)}
    assert factors == {WHOLE // 8}


def test_a_norm_over_the_limit_is_named_with_the_limit() -> None:
    consensus = server({"norm_limit": 3.0}, [1.0] * 8)
    consensus.accept("pi-00", vector(2.9), 1.0)
    before = consensus.snapshot()
    with pytest.raises(ContributionError, match=r"device pi-01: its step is 3\.1 times the fleet's median") as refusal:
        consensus.accept("pi-01", vector(3.1), 1.0)
    assert refusal.value.code == "norm_bound"
    np.testing.assert_equal(consensus.snapshot(), before)


def test_a_fleet_whose_steps_have_grown_is_let_in_again_after_a_few_rounds() -> None:
    consensus = server({"norm_limit": 2.0}, [1.0] * 8)
    waited = 0
    while True:
        consensus.open_round(NAMES[:8])
        try:
            for name in NAMES[:8]:
                consensus.accept(name, vector(30.0), 1.0)
        except ContributionError:
            waited += 1
            consensus.close_round()
        else:
            break
    assert waited == 4  # limits of 2, 4, 8 and 16 medians


def test_a_step_against_the_fleets_last_one_is_refused_until_there_is_none() -> None:
    consensus = server({"min_cosine": -0.5}, [1.0] * 8)
    consensus.open_round(NAMES[:8])
    with pytest.raises(ContributionError, match=r"device pi-00: cosine -1\.00") as refusal:
        consensus.accept("pi-00", vector(-1.0), 1.0)
    assert refusal.value.code == "direction_bound"
    consensus.accept("pi-01", np.array([-1.0, 2.0, 0.0, 0.0], np.float32), 1.0)
    consensus.accept("pi-02", vector(0.0), 1.0)
    consensus.close_round()  # with two of eight: the fleet has no direction now
    consensus.accept("pi-00", vector(-1.0), 1.0)


def test_a_restored_server_bounds_as_before() -> None:
    changes = {"robust": "clip", "norm_limit": 3.0, "min_cosine": -0.5}
    original = Fleet(averaging(**changes), LIES["random"]).play(5).consensus
    restored = Consensus.restore(original.snapshot(), method=original.method)
    for consensus in (original, restored):
        consensus.accept("pi-05", np.full(SIZE, 0.01, np.float32), 1.0)
        consensus.close_round()
    np.testing.assert_equal(restored.snapshot(), original.snapshot())


# ---- centres -----------------------------------------------------------------------------------------------


def differences(count: int, size: int) -> list[tuple[str, FloatVector]]:
    values = np.random.default_rng(2).normal(size=(count, size)).astype(np.float32)
    return [(f"pi-{i}", value) for i, value in enumerate(values)]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_the_median_is_that_of_every_coordinate(count: int) -> None:
    given = differences(count, 7)
    fused = robust.fuse(averaging(robust="median"), lambda: given, [name for name, _ in given], 7)
    expected = np.median(np.stack([value for _, value in given]).astype(np.float64), axis=0)
    assert fused == pytest.approx(expected, abs=1e-15)


def test_the_trimmed_mean_leaves_out_its_share_at_either_end() -> None:
    given = differences(9, 7)
    fused = robust.fuse(averaging(robust="trimmed", trim=0.25), lambda: given, [name for name, _ in given], 7)
    ordered = np.sort(np.stack([value for _, value in given]), axis=0)[2:7]
    assert fused == pytest.approx(ordered.mean(axis=0, dtype=np.float64), abs=1e-15)


@pytest.mark.parametrize("rule", ["median", "trimmed"])
def test_a_centre_does_not_depend_on_order_or_block(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = differences(6, 50)
    names = [name for name, _ in given]
    whole = robust.fuse(averaging(robust=rule), lambda: given, names, 50)
    monkeypatch.setattr(robust, "_BLOCK_VALUES", 6 * 7)
    calls = 0

    def from_disk() -> Iterator[tuple[str, FloatVector]]:
        nonlocal calls
        calls += 1
        yield from reversed(given)

    assert robust.fuse(averaging(robust=rule), from_disk, names, 50).tobytes() == whole.tobytes()
    assert calls == 8  # blocks of seven columns


def test_a_round_whose_contributions_do_not_come_back_is_not_fused() -> None:
    consensus = Consensus(np.zeros(7, np.float32), method=averaging(robust="median"))
    for name, difference in differences(3, 7):
        consensus.join(name, 1)
        consensus.accept(name, difference, 1.0)
    before = consensus.snapshot()
    with pytest.raises(ContributionError, match="but those of") as refusal:
        consensus.close_round(contributions=lambda: differences(2, 7))
    assert refusal.value.code == "not_contributed"
    with pytest.raises(ConfigError, match="needs all contributions"):
        consensus.close_round()
    np.testing.assert_equal(consensus.snapshot(), before)
