"""What R_well and R_ill cost in a training step of a ResNet-18 at 64 pixels with batches of 64; see `make bench`.

Three steps are timed in turn, so that a change of the machine's speed hits all of them:

- both: a benign and a restricted batch pass forward and backward, with the cross-entropy of the one and the mean square
  of the other's features in the place of the regularizers;
- regularized: the same two batches with the cross-entropy, R_well and R_ill, as Algorithm 1 has it;
- benign: the benign batch alone.

The limit is on regularized over both: what the spectral mathematics adds. The second batch, which Algorithm 1 needs
whatever its regularizers cost, shows in regularized over benign. Writes benchmarks/results.json and exits with 1 if the
ratio is over its limit.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.models import SplitModel, load_model
from holdfast.spectral.regularizers import r_ill_of_features, r_well_of_features
from holdfast.tasks import ArrayTask

LIMIT = 1.15
BATCH = 64
PAIRS = 9


def setting() -> tuple[SplitModel, Tensor, Tensor, Tensor]:
    """A ResNet-18 and random images: speed does not depend on what is in them."""
    torch.manual_seed(0)
    images = (torch.rand(2 * BATCH, 64, 64, 3) * 255).byte().numpy()
    labels = torch.arange(2 * BATCH).numpy() % 10
    task = ArrayTask("random", images, labels, images[:10], labels[:10])
    batch = next(task.sweep("train", 2 * BATCH, device=torch.device("cpu")))
    model = load_model("timm:resnet18", task).train()
    return model, batch.x[:BATCH], batch.y[:BATCH], batch.x[BATCH:]


def main() -> int:
    """Measures, prints and writes; returns the exit code."""
    model, benign, labels, restricted = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def step(loss: Callable[[], Tensor]) -> float:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        return time.perf_counter() - begin

    def alone() -> Tensor:
        return F.cross_entropy(model(benign), labels)

    def both() -> Tensor:
        return alone() + model.features(restricted).square().mean()

    def regularized() -> Tensor:
        logits, features = model.with_features(benign)
        theirs = model.features(restricted)
        terms = 1e-9 * r_well_of_features(features.double()) + 1e-9 * r_ill_of_features(theirs.double())
        return F.cross_entropy(logits, labels) + terms

    kinds = {"benign": alone, "both": both, "regularized": regularized}
    for loss in kinds.values():  # warms up
        step(loss)
    times = [{name: step(loss) for name, loss in kinds.items()} for _ in range(PAIRS)]
    ratios = {
        f"regularized_over_{other}": sorted(t["regularized"] / t[other] for t in times) for other in ("both", "benign")
    }
    for name, values in ratios.items():
        limit = f"limit {LIMIT:.2f}" if name.endswith("both") else "no limit"
        print(f"{name:24} {statistics.median(values):6.3f}   ({values[0]:.3f} to {values[-1]:.3f})   {limit}")
    result = {
        "limit": LIMIT,
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "pairs": ratios,
        "seconds": {name: statistics.median(t[name] for t in times) for name in kinds},
        "setting": f"timm resnet18, 64x64, batches of {BATCH}, SGD with Nesterov momentum, CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    path = Path(__file__).with_name("results.json")
    whole = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**whole, "regularizer_overhead": result}, indent=1) + "\n")
    return int(result["ratios"]["regularized_over_both"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
