"""What exact sums are for: any order, any split over servers, contributions taken back, and no silent overflow."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import MemoryDuals
from fedeq_edge.consensus.fixed import SUM_LIMIT, FixedVector, FloatVector
from fedeq_edge.consensus.methods import Method, method
from fedeq_edge.consensus.records import PartialSum
from fedeq_edge.errors import ConfigError, ContributionError

DEVICES = tuple(f"pi-{i}" for i in range(6))
SIZE = 50
METHODS = ("metric", "objective", "mean", "clip")
Contribution = tuple[str, FloatVector, float]


def chosen(name: str) -> Method:
    if name == "mean":
        return method("fedprox")
    if name == "clip":
        return msgspec.structs.replace(method("admm"), robust="clip", norm_limit=1e9)
    return msgspec.structs.replace(method("admm"), weighting=name)


def server(name: str, duals: MemoryDuals | None = None) -> Consensus:
    consensus = Consensus(np.zeros(SIZE, np.float32), method=chosen(name), duals=duals)
    for number, device in enumerate(DEVICES):
        consensus.join(device, 1 + 37 * number)
    return consensus


def drawn(consensus: Consensus, rng: np.random.Generator) -> list[Contribution]:
    """One contribution of each device; magnitudes over many orders, so that float sums would depend on the order."""
    scales = 10.0 ** rng.uniform(-6, 0, len(DEVICES))
    return [
        (device, (scale * rng.normal(size=SIZE)).astype(np.float32), consensus.penalty(device))
        for device, scale in zip(DEVICES, scales, strict=True)
    ]


def play(consensus: Consensus, arrivals: Sequence[Contribution]) -> None:
    consensus.open_round(DEVICES[:4])
    for contribution in arrivals:
        consensus.accept(*contribution)


def after_a_few_rounds(name: str, duals: MemoryDuals | None = None) -> Consensus:
    consensus = server(name, duals)
    rng = np.random.default_rng(8)
    for _ in range(3):
        play(consensus, drawn(consensus, rng))
        consensus.set_quality({device: float(rng.uniform(0.0, 4.0)) for device in DEVICES})
        consensus.close_round()
    return consensus


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(order=st.permutations(range(len(DEVICES))), seed=st.integers(0, 2**32 - 1))
def test_any_order_of_arrival_makes_the_same_bits(name: str, order: list[int], seed: int) -> None:
    servers = [after_a_few_rounds(name), after_a_few_rounds(name)]
    arrivals = drawn(servers[0], np.random.default_rng(seed))
    play(servers[0], arrivals)
    play(servers[1], [arrivals[number] for number in order])
    np.testing.assert_equal(servers[0].snapshot(), servers[1].snapshot())
    assert servers[0].close_round() == servers[1].close_round()
    np.testing.assert_equal(servers[0].snapshot(), servers[1].snapshot())


@pytest.mark.parametrize("name", METHODS)
def test_a_contribution_taken_back_leaves_no_trace(name: str) -> None:
    duals, untouched = MemoryDuals(), MemoryDuals()
    consensus, other = after_a_few_rounds(name, duals), after_a_few_rounds(name, untouched)
    arrivals = drawn(consensus, np.random.default_rng(3))
    play(consensus, arrivals)
    play(other, arrivals[:2])
    for contribution in arrivals[2:]:
        consensus.retract(*contribution)
    np.testing.assert_equal(consensus.snapshot(), other.snapshot())
    if name != "mean":
        for device in DEVICES:
            assert (duals.get(device) == untouched.get(device)).all()


def test_a_contribution_is_taken_back_at_the_weight_that_it_came_with() -> None:
    consensus = server("objective")
    contribution = drawn(consensus, np.random.default_rng(4))[0]
    consensus.accept(*contribution)
    consensus.set_quality({DEVICES[0]: 4.0, DEVICES[1]: 0.0})
    consensus.set_samples(DEVICES[0], 999)
    consensus.retract(*contribution)
    assert (consensus.sums[0] == 0).all()
    assert consensus.partial().weight == consensus.partial().squares == 0
    assert consensus.close_round().contributors == ()


def test_of_two_contributions_of_one_device_the_right_one_is_taken_back() -> None:
    consensus, other = server("metric"), server("metric")
    rng = np.random.default_rng(5)
    late, current = drawn(consensus, rng)[0], drawn(consensus, rng)[0]
    play(consensus, [late, current])
    consensus.retract(*late)
    play(other, [current])
    np.testing.assert_equal(consensus.snapshot(), other.snapshot())


@pytest.mark.parametrize("change", [lambda d, k: (d + 1, k), lambda d, k: (d, 2 * k), lambda d, k: (-d[::-1] * 2, k)])
def test_what_was_not_contributed_cannot_be_taken_back(
    change: Callable[[FloatVector, float], tuple[FloatVector, float]],
) -> None:
    consensus = server("metric")
    device, difference, kappa = drawn(consensus, np.random.default_rng(6))[0]
    consensus.accept(device, difference, kappa)
    before = consensus.snapshot()
    with pytest.raises(ContributionError, match="device pi-0: the open round holds no such contribution") as refusal:
        consensus.retract(device, *change(difference, kappa))
    assert refusal.value.code == "not_contributed"
    np.testing.assert_equal(consensus.snapshot(), before)


def test_a_contribution_of_a_closed_round_cannot_be_taken_back() -> None:
    consensus = server("metric")
    contribution = drawn(consensus, np.random.default_rng(6))[0]
    consensus.accept(*contribution)
    consensus.close_round()
    with pytest.raises(ContributionError, match="holds no such contribution"):
        consensus.retract(*contribution)


@pytest.mark.parametrize("name", ["metric", "objective", "mean"])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(workers=st.lists(st.integers(0, 3), min_size=6, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_partial_sums_of_any_split_make_the_z_of_one_server(name: str, workers: list[int], seed: int) -> None:
    single, duals = after_a_few_rounds(name), MemoryDuals()
    root = after_a_few_rounds(name, duals)
    arrivals = drawn(single, np.random.default_rng(seed))
    play(single, arrivals)
    root.open_round(DEVICES[:4])
    opened = root.snapshot()
    for worker in set(workers):
        part = Consensus.restore(opened, method=root.method, duals=duals)
        for contribution, owner in zip(arrivals, workers, strict=True):
            if owner == worker:
                part.accept(*contribution)
        root.accept_sum(part.partial())
    assert root.close_round() == single.close_round()
    assert root.z.tobytes() == single.z.tobytes()
    assert root.z_hat.tobytes() == single.z_hat.tobytes()
    assert (root.sums[0] == single.sums[0]).all()
    assert (root.sums[0] == root.recomputed()[0]).all()


def test_masks_modulo_two_to_the_64_cancel_in_the_sum() -> None:
    single, root = server("mean"), server("mean")
    arrivals = drawn(single, np.random.default_rng(9))
    play(single, arrivals)
    mask = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, SIZE)
    masked = []
    for contribution, sign in zip(arrivals[:2], (1, -1), strict=True):
        part = server("mean")
        part.accept(*contribution)
        masked.append(replace(part.partial(), steps=part.partial().steps + sign * mask))
    rest = server("mean")
    play(rest, arrivals[2:])
    together = masked[0].steps + masked[1].steps
    root.accept_sum(
        PartialSum(
            steps=together + rest.partial().steps,
            weight=sum(part.weight for part in (*masked, rest.partial())),
            squares=sum(part.squares for part in (*masked, rest.partial())),
            devices=DEVICES,
        )
    )
    single.close_round()
    root.close_round()
    assert root.z.tobytes() == single.z.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": np.zeros(SIZE - 1, np.int64)},
        {"steps": np.zeros(SIZE)},
        {"weight": 0},
        {"squares": -1},
        {"devices": ()},
        {"devices": ("pi-99",)},
        {"steps": np.full(SIZE, -(2**63))},
    ],
)
def test_a_sum_that_does_not_fit_is_refused_without_a_trace(change: dict[str, object]) -> None:
    consensus = server("metric")
    part = server("metric")
    part.accept(*drawn(part, np.random.default_rng(0))[0])
    before = consensus.snapshot()
    with pytest.raises(ContributionError) as refusal:
        consensus.accept_sum(replace(part.partial(), **change))  # type: ignore[arg-type]  # one field of several types
    assert refusal.value.code in ("bad_sum", "not_a_member", "too_large")
    np.testing.assert_equal(consensus.snapshot(), before)


def test_a_method_that_bounds_single_contributions_takes_no_sums() -> None:
    consensus, part = server("clip"), server("metric")
    part.accept(*drawn(part, np.random.default_rng(0))[0])
    with pytest.raises(ConfigError, match="bounds single contributions"):
        consensus.accept_sum(part.partial())


# ---- nothing wraps -----------------------------------------------------------------------------------------


def flooded(samples: int) -> tuple[Consensus, Contribution]:
    """A server to which one device sends steps just below the limit, on and on."""
    consensus = Consensus(np.zeros(2, np.float32), method=msgspec.structs.replace(method("admm"), rho=1.0))
    for device in DEVICES:
        consensus.join(device, samples)
    return consensus, ("pi-0", np.array([2.0**19, -(2.0**19)], np.float32), 1.0)


@pytest.mark.parametrize("closing", [False, True])
def test_a_sum_that_would_wrap_is_refused_and_goes_on_with_others(closing: bool) -> None:
    consensus, contribution = flooded(100)
    for _ in range(20):  # 20 * 100 * 2^51 is the last multiple below 2^62
        consensus.accept(*contribution)
        if closing:
            consensus.close_round()
    before = consensus.snapshot()
    with pytest.raises(ContributionError, match="device pi-0: the weighted sum") as refusal:
        consensus.accept(*contribution)
    assert refusal.value.code == "too_large"
    np.testing.assert_equal(consensus.snapshot(), before)
    H, R = consensus.sums
    assert H.tolist() == [20 * 100 * 2**51, -20 * 100 * 2**51]
    assert (consensus.recomputed()[0] == H).all()
    assert consensus.recomputed()[1] == R
    consensus.accept("pi-1", -contribution[1], 1.0)
    assert consensus.close_round().contributors[-1] == "pi-1"
    consensus.retire("pi-0")
    assert consensus.sums[0].tolist() == [-100 * 2**51, 100 * 2**51]


def test_steps_that_cancel_never_use_up_the_bound() -> None:
    consensus, (device, difference, kappa) = flooded(100)
    for number in range(100):
        consensus.accept(device, (-1.0) ** number * difference, kappa)
    assert (consensus.sums[0] == 0).all()


def test_a_dual_that_would_wrap_is_refused() -> None:
    nu = np.array([SUM_LIMIT - 2, 0])
    consensus, contribution = flooded(1)
    consensus.join("pi-0", 1, nu=nu)
    consensus.join("pi-1", 1, nu=-nu)  # so that their sum has room
    with pytest.raises(ContributionError, match="device pi-0: its dual would leave 62 bits") as refusal:
        consensus.accept(*contribution)
    assert refusal.value.code == "too_large"
    consensus.accept("pi-0", -contribution[1], 1.0)
    assert (np.abs(consensus.recomputed()[0]) < 2**53).all()


@pytest.mark.parametrize(
    "nu", [np.array([SUM_LIMIT, 0]), np.array([0, -(2**63)]), np.zeros(2, np.float32), np.array([SUM_LIMIT // 100, 0])]
)
def test_a_dual_that_is_none_cannot_be_joined_with(nu: FixedVector) -> None:
    consensus, _ = flooded(100)
    before = consensus.snapshot()
    with pytest.raises(ContributionError, match="device pi-0: omega nu is no int64 vector"):
        consensus.join("pi-0", 101, nu=nu)
    np.testing.assert_equal(consensus.snapshot(), before)


def test_liars_whose_huge_duals_cancel_can_be_retired_in_any_order() -> None:
    consensus, _ = flooded(100)
    honest = np.array([5, -7])
    consensus.join("pi-0", 100, nu=honest)
    huge = np.array([2**55, 2**55])  # times 100 samples: 3.6e18, and two of them do not fit in 62 bits
    for liar, sign in (("pi-1", 1), ("pi-2", -1), ("pi-3", 1), ("pi-4", -1)):
        consensus.join(liar, 100, nu=sign * huge)
    for liar in ("pi-1", "pi-3", "pi-2", "pi-4"):
        consensus.retire(liar)
    assert (consensus.sums[0] == 100 * honest).all()
    consensus.accept("pi-0", np.zeros(2, np.float32), 1.0)


def test_samples_that_would_make_the_sum_wrap_are_refused() -> None:
    consensus, contribution = flooded(100)
    consensus.accept(*contribution)
    before = consensus.snapshot()
    with pytest.raises(ContributionError, match="device pi-0: the weighted sum"):
        consensus.set_samples("pi-0", 2**31)
    with pytest.raises(ContributionError, match="4294967296 training samples"):
        consensus.set_samples("pi-0", 2**32)
    np.testing.assert_equal(consensus.snapshot(), before)
