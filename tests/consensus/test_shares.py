"""A root over workers: the same z as one server over all devices, bit for bit, whoever comes, goes or is lost."""

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.fixed import SUM_LIMIT, FloatVector
from fedeq_edge.consensus.methods import Method, method
from fedeq_edge.consensus.records import Share
from fedeq_edge.errors import ConfigError, ContributionError

SIZE = 50
WORKERS = {"w0": ("a", "b", "c"), "w1": ("d",), "w2": ("e", "f")}
METHODS = {"admm": method("admm"), "fedprox": method("fedprox")}


def consensus(chosen: Method, start: FloatVector) -> Consensus:
    return Consensus(start, method=chosen)


class Tree:
    """The same devices twice: at one server, and at three workers under a root."""

    def __init__(self, chosen: Method) -> None:
        self.rng = np.random.default_rng(3)
        start = self.rng.normal(size=SIZE).astype(np.float32)
        self.one, self.root = consensus(chosen, start), consensus(chosen, start)
        self.workers = {name: consensus(chosen, start) for name in WORKERS}
        for name, devices in WORKERS.items():
            for device in devices:
                self.both(name, lambda server, device=device: server.join(device, 1 + 37 * ord(device)))

    def both(self, worker: str, act: object) -> None:
        for server in (self.one, self.workers[worker]):
            act(server)  # type: ignore[operator]  # any method of a consensus

    def contribute(self, *absent: str) -> None:
        """Steps over many orders of magnitude, whose float sums would depend on the order."""
        for name, devices in reversed(WORKERS.items()):
            for device in devices:
                step = (10.0 ** self.rng.uniform(-6, 0) * self.rng.normal(size=SIZE)).astype(np.float32)
                if device not in absent:
                    kappa = self.one.penalty(device)
                    self.both(name, lambda server, a=(device, step, kappa): server.accept(*a))

    def shares(self) -> Mapping[str, Share]:
        return {name: worker.hand_over()[0] for name, worker in self.workers.items()}

    def close(self) -> None:
        self.root.gather(self.shares())
        self.root.close_round()
        self.one.close_round()
        for worker in self.workers.values():
            worker.follow(self.root.z_hat)

    def agree(self) -> bool:
        same = self.one.z.tobytes() == self.root.z.tobytes()
        return same and all(worker.z_hat.tobytes() == self.one.z_hat.tobytes() for worker in self.workers.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_root_closes_as_one_server_would(name: str) -> None:
    tree = Tree(METHODS[name])
    for absent in ((), ("a", "f"), ("d",), ()):
        tree.contribute(*absent)
        tree.close()
        assert tree.agree()


def test_devices_come_go_weigh_otherwise_and_begin_anew_at_their_workers() -> None:
    tree = Tree(METHODS["admm"])
    changes = (
        ("w0", lambda server: server.retire("b")),
        ("w2", lambda server: server.join("f", 9)),
        ("w1", lambda server: server.set_samples("d", 12345)),
        ("w0", lambda server: server.join("b", 11)),
    )
    for worker, change in changes:
        tree.contribute("b")
        tree.both(worker, change)
        tree.close()
        assert tree.agree()


def test_what_comes_after_the_share_is_in_the_next_one() -> None:
    tree = Tree(METHODS["admm"])
    tree.contribute("a")
    shares = tree.shares()
    tree.root.gather(shares)
    tree.root.close_round()
    tree.one.close_round()
    late = (np.ones(SIZE, np.float32), tree.one.penalty("a"))
    tree.both("w0", lambda server: server.accept("a", *late))
    for worker in tree.workers.values():
        worker.follow(tree.root.z_hat)
    tree.contribute("a")
    tree.close()
    assert tree.agree()


def test_a_worker_that_has_lost_everything_counts_like_devices_that_have() -> None:
    tree = Tree(METHODS["admm"])
    tree.contribute()
    tree.close()
    tree.workers["w2"] = consensus(METHODS["admm"], tree.root.z_hat)
    for device in WORKERS["w2"]:
        tree.one.join(device, 5)
        tree.workers["w2"].join(device, 5)
    tree.contribute("e")
    tree.close()
    assert tree.agree()


def test_shares_that_do_not_fit_leave_the_root_as_it_was() -> None:
    tree = Tree(METHODS["admm"])
    tree.contribute()
    shares = tree.shares()
    whole = shares["w0"]
    wrong = {
        "wrong_shape": replace(whole, steps=whole.steps[1:]),
        "bad_sum": replace(whole, weight=-1),
        "too_large": replace(whole, duals=np.full(SIZE, SUM_LIMIT)),
    }
    for code, share in wrong.items():
        with pytest.raises(ContributionError) as refused:
            tree.root.gather({**shares, "w0": share})
        assert refused.value.code == code
    tree.root.gather(shares)
    tree.root.close_round()
    tree.one.close_round()
    assert tree.root.z.tobytes() == tree.one.z.tobytes()


def test_a_method_that_looks_at_every_contribution_has_no_workers() -> None:
    robust = msgspec.structs.replace(method("fedprox"), robust="trimmed")
    with pytest.raises(ConfigError, match="without workers"):
        consensus(robust, np.zeros(SIZE, np.float32)).gather({})
