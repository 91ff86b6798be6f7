"""Every method measured alike, on the test part of a client's data.

Of one client and a consensus: accuracy of z + w as it stands, of z with its head refitted (the same refit for all
methods), of local theta_i + w_i after a round of its own, and of what the method delivers, at every K of a list.

What settings are chosen by is measured by the same functions on a client from `training.holdout.held_out`, whose test
part is a piece of its training data: nothing here can then see the real one.
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from fedeq_edge.consensus.methods import Method
from fedeq_edge.consensus.quality import score
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.backend import Backend, Labels, Matrix, Samples, solve_each
from fedeq_edge.training.learner import EVALUATION_BATCH, Learner, Subject
from fedeq_edge.training.neighbours import Neighbours, hits, mixed
from fedeq_edge.training.refit import accuracy, chances, cross_entropy, fit_head
from fedeq_edge.training.step import LocalResult, LocalTask, Vector

Solved = tuple[Matrix, Vector]
"""(features (n, f), relative residuals (n,)) of n samples at one K."""


class AtBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What K = `evaluations` give on the test part.

    consensus: accuracy of z with the head as it came; loss: its cross-entropy in nats; training_loss: the same on the
    training part, by which a device could choose its K. refit: of z with the head fitted to the training part as K
    evaluations see it. local: of theta_i + w_i, None where nothing was trained.
    residual, residual_most: mean and largest relative residual of z over the samples; 0 for explicit networks.
    """

    evaluations: int
    consensus: float
    loss: float
    training_loss: float
    refit: float
    local: float | None
    residual: float
    residual_most: float


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What the round behind theta_i reported. score: s_i by the method's rule, of which q_i is made."""

    loss: float
    residual: float
    backward_residual: float
    score: float
    steps: int


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One client's numbers. training, test: samples. own: the K that its budget makes it answer with.

    curve: by ascending K, `own` among them. delivered: accuracy, at `own`, of the personal model that the method makes:
    refitted, trained alone, Ditto's, fine-tuned, or mixed with neighbours, whose share is neighbour_share (None else).
    """

    training: int
    test: int
    own: int
    curve: tuple[AtBudget, ...]
    delivered: float
    neighbour_share: float | None
    trained: Trained | None

    def at(self, evaluations: int) -> AtBudget:
        """The point of the curve with this K. Raises ConfigError naming those that were measured."""
        for point in self.curve:
            if point.evaluations == evaluations:
                return point
        measured = ", ".join(str(point.evaluations) for point in self.curve)
        raise ConfigError(f"evaluation: K = {evaluations} was not measured; choose from {measured}")


def evaluate(learner: Learner, task: LocalTask, *, budgets: Sequence[int] = (), local: bool = True) -> Evaluation:
    """The numbers of the learner's client, for the consensus and the head of `task`, at its own K and all `budgets`.

    local: train the task's round for theta_i; its duals, penalty and seed are used for that alone. A method without
    exchange trains alone for the whole federation instead. For a client that has never taken part the head is that of
    `mean_head`. The backend holds other parameters afterwards.
    Raises ConfigError for a client without test samples, SolverError where its training diverges.
    """
    backend, data, _, method = learner.subject
    if not len(data.y_test):
        raise ConfigError("evaluation: this client has no test samples; give it some, or leave it out")
    theta, head = learner.split(task.z, task.head)
    backend.load(theta, head)
    own = learner.own_forward()
    menu = sorted({own, *budgets})
    result, theirs = _round(learner, task) if local and method.exchange else (None, None)
    personal = learner.personalise(task.z, task.head) if trains_at_delivery(method) else None
    if personal is not None and not method.exchange:
        theirs = personal.theta, personal.head
    locally = [None] * len(menu) if theirs is None else _accuracies(backend, theirs, data.x_test, data.y_test, menu)
    backend.load(theta, head)
    train, test = (features_at(backend, x, menu) for x in (data.x_train, data.x_test))
    curve, at = _curve(learner.subject, menu, head, train, test, locally), menu.index(own)
    delivered, share = curve[at].refit if personal is None else personal.accuracy_personal, None
    if method.neighbours:
        delivered, share = _with_neighbours(learner.subject, head, train[at][0], test[at][0])
    return Evaluation(
        training=len(data.y_train),
        test=len(data.y_test),
        own=own,
        curve=tuple(curve),
        delivered=delivered,
        neighbour_share=share,
        trained=None if result is None else _trained(method, result),
    )


def trains_at_delivery(method: Method) -> bool:
    """Whether the personal model of a method takes training, beyond the refit of a head."""
    return not method.exchange or method.ditto > 0.0 or method.finetune_epochs > 0


def mean_head(heads: Iterable[tuple[Vector, int]]) -> Vector:
    """The head for a client that has none of its own, (h,): the mean of others', each weighted by its samples.

    heads: (head, samples), at least one; one of them is held at a time.
    """
    total, samples = np.zeros(1), 0
    for head, weight in heads:
        total, samples = total + weight * head.astype(np.float64), samples + weight
    return (total / samples).astype(np.float32)


def features_at(backend: Backend, x: Samples, budgets: Sequence[int]) -> list[Solved]:
    """(features (n, f), relative residuals (n,)) of samples x (n, *input_shape), n >= 1, at each K.

    One walk to the largest K where the backend can (`AnytimeBackend`), a solve for each K elsewhere.
    """
    parts = [solve_each(backend, x[at : at + EVALUATION_BATCH], budgets) for at in range(0, len(x), EVALUATION_BATCH)]
    return [
        (np.concatenate([features for features, _ in found]), np.concatenate([residual for _, residual in found]))
        for found in zip(*parts, strict=True)
    ]


def _round(learner: Learner, task: LocalTask) -> tuple[LocalResult, tuple[Vector, Vector]]:
    """What a round of its own reports, and (theta_i, w_i) after it."""
    result = learner.train(task)
    return result, learner.subject.backend.parameters()


def _accuracies(
    backend: Backend, model: tuple[Vector, Vector], x: Samples, labels: Labels, budgets: Sequence[int]
) -> list[float | None]:
    """Of a model (theta, head), at each K."""
    backend.load(*model)
    return [accuracy(features, labels, model[1]) for features, _ in features_at(backend, x, budgets)]


def _curve(
    subject: Subject,
    menu: Sequence[int],
    head: Vector,
    train: Sequence[Solved],
    test: Sequence[Solved],
    locally: Sequence[float | None],
) -> list[AtBudget]:
    """A point for each K of the menu, whose solves these are; a refit is spared where K has changed nothing."""
    _, data, plan, _ = subject
    curve: list[AtBudget] = []
    for at, K in enumerate(menu):
        if at and _alike(train[at], train[at - 1]) and _alike(test[at], test[at - 1]):
            curve.append(msgspec.structs.replace(curve[-1], evaluations=K))
            continue
        refitted = fit_head(
            train[at][0], data.y_train, head, steps=plan.refit_steps, rate=plan.refit_rate, pull=plan.refit_pull
        )
        training_loss = cross_entropy(train[at][0], data.y_train, head)
        curve.append(_point(K, test[at], data.y_test, head, refitted, training_loss, locally[at]))
    return curve


def _alike(found: Solved, before: Solved) -> bool:
    """Whether another K has changed nothing at all: an explicit network, or a model that has converged to the bit."""
    return all(np.array_equal(now, then) for now, then in zip(found, before, strict=True))


def _point(
    K: int,
    seen: Solved,
    labels: Labels,
    head: Vector,
    refitted: Vector,
    training_loss: float,
    local: float | None,
) -> AtBudget:
    features, residual = seen
    return AtBudget(
        evaluations=K,
        consensus=accuracy(features, labels, head),
        loss=cross_entropy(features, labels, head),
        training_loss=training_loss,
        refit=accuracy(features, labels, refitted),
        local=local,
        residual=float(residual.mean(dtype=np.float64)),
        residual_most=float(residual.max()),
    )


def _with_neighbours(subject: Subject, head: Vector, train: Matrix, test: Matrix) -> tuple[float, float]:
    """(accuracy of head and neighbours together, share of the neighbours): chosen on the training samples alone."""
    neighbours = Neighbours(
        features=train,
        labels=subject.data.y_train,
        classes=subject.backend.description.classes,
        nearest=subject.method.neighbours,
        scale=subject.method.neighbour_scale,
    )
    share = neighbours.best_share(chances(train, head))
    return hits(mixed(share, neighbours.chances(test), chances(test, head)), subject.data.y_test), share


def _trained(method: Method, result: LocalResult) -> Trained:
    return Trained(
        loss=result.loss,
        residual=result.residual,
        backward_residual=result.backward_residual,
        score=score(
            method.quality,
            residual=result.residual,
            backward_residual=result.backward_residual,
            forward=result.budget.forward,
            r0=method.r0,
        ),
        steps=result.steps,
    )
