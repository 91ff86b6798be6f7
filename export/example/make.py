"""Make the files of this folder again: a model of the handwritten digits, ten samples, and what it answers.

    pip install -e '.[torch,onnx,demo]'
    python export/example/make.py [FOLDER]

Trained in one place on four fifths of scikit-learn's digits: with budgets K drawn from 1 to 12, as devices draw them,
so that one file serves every budget, and with images that are turned and moved a little, as what people draw is. On
one machine with the same versions the bytes are the same.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from fedeq_edge.data.digits import DIGITS, digits_fleet
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.export import export
from fedeq_edge.onnx.runtime import Predictor
from fedeq_edge.training.schedule import learning_rate
from fedeq_edge.training.step import Budget, Plan
from fedeq_edge.training.torch_step import Descent

TRAIN = 1440  # of 1797 images
PLAN = Plan(rounds=60, batch=32, learning_rate=0.1, weight_decay=1e-4, budgets=(1, 2, 3, 4, 6, 8, 12))
BUDGET = 30  # most evaluations by default; the tolerance stops earlier


def main(folder: Path) -> None:
    """The files stand in `folder`."""
    torch.set_num_threads(1)
    digits = digits_fleet(devices=1, labels=DIGITS, train_per_device=TRAIN)["device-0"]
    model = trained(digits)
    theta, head = model.theta.numpy(), model.head_vector.numpy()
    export(model.spec, theta, head, folder / "model.onnx", budget=BUDGET)
    predictor = Predictor(folder / "model.onnx")
    found = predictor.infer(digits.x_test)
    print(f"accuracy on {len(digits.y_test)} test images: {np.mean(found.logits.argmax(1) == digits.y_test):.3f}")
    samples = one_of_each(digits)
    answers = predictor.infer(samples)
    for name, values in (("samples", samples), ("logits", answers.logits), ("iterations", answers.iterations)):
        np.save(folder / f"{name}.npy", values)


def trained(digits: ClientData) -> DEQ:
    """A contractive model, hence one with a certificate, after all rounds of the plan."""
    spec = ModelSpec(
        input_shape=digits.x_train.shape[1:],
        classes=DIGITS,
        channels=8,
        radius=0.95,
        pool=4,
        shift=(float(digits.x_train.mean()),),
        scale=(float(digits.x_train.std()),),
    )
    model = DEQ(spec)
    model.load(*initial(spec, seed=0))
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(digits.x_train), torch.from_numpy(digits.y_train)
    torch.manual_seed(0)
    for number in range(PLAN.rounds):
        descent = Descent(model, PLAN, rate=learning_rate(PLAN, number), pull=None, frozen_head=False)
        for rows in rng.permutation(len(y)).reshape(-1, PLAN.batch):
            forward = int(rng.choice(PLAN.budgets))
            descent.step(
                as_drawn(x[rows]).numpy(), y[rows].numpy(), Budget(forward=forward, adjoint=max(1, forward // 2))
            )
    return model


def as_drawn(x: torch.Tensor) -> torch.Tensor:
    """The images (B, 1, 8, 8), each turned, sheared, scaled, moved and inked a little as a mouse would have done it."""
    change = 0.12 * torch.randn(len(x), 2, 3)
    change[:, :, :2] += torch.eye(2)
    grid = torch.nn.functional.affine_grid(change, list(x.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    return (moved * (0.7 + 0.6 * torch.rand(len(x), 1, 1, 1))).clamp(0.0, 1.0)


def one_of_each(digits: ClientData) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The first test image of each digit, (10, 1, 8, 8)."""
    return digits.x_test[[int(np.argmax(digits.y_test == digit)) for digit in range(DIGITS)]]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
