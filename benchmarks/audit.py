"""Two ratios of audits, each measured in one run on one thread; see `make bench`.

- stacked: adversaries of the built-in CNN without BatchNorm, one by one over trained together.
- overhead: an audit with `quick-v1`, in a folder, one by one, over the training steps of its adversaries alone.

Beside them: what `torch.func.vmap` over the plain model would gain. The first and the last are in processor time, so
that what else the machine does counts little; the overhead, which waits for the disk, in both. Writes
benchmarks/results.json and exits with 1 if a ratio misses its limit.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from holdfast.adversaries import FineTuning, battery
from holdfast.adversaries.batched import Member, attack_together, stacks
from holdfast.auditing.audit import audit
from holdfast.auditing.spec import AuditSpec
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.results import Curve
from holdfast.runtime.run import Run
from holdfast.tasks import ArrayTask, load_task
from holdfast.training import Strategy, finetune, pretrain

FLOORS = {"one_by_one_over_stacked": 3.0}
LIMITS = {"stacked_difference_of_losses": 1e-4, "stacked_samples_judged_otherwise": 1e-4, "audit_over_bare_steps": 1.10}
CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
BUDGETS = (0, 5, 10, 20, 50, 100)
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)


def setting() -> tuple[SplitModel, ArrayTask, ArrayTask]:
    """The CNN on half of the digits, and the other half."""
    benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
    torch.manual_seed(0)
    model = load_model(ModelSpec(name="cnn", options={"norm": "none"}), benign)
    return pretrain(model, benign, steps=200, run=Run(device=CPU)), benign, restricted


def group(model: SplitModel, task: ArrayTask, batch_size: int) -> list[Member]:
    """Thirty members: five rates, three roles, two seeds."""
    with Run(device=CPU).seeded("scratch"):
        roles = {"immunized": model, "original": model.clone(), "scratch": model.fresh()}
    members = [
        Member(FineTuning(Strategy("head", "all", "adam", rate, batch_size)), released, task, role, seed)  # type: ignore[arg-type]
        for seed in (0, 1)
        for rate in RATES
        for role, released in roles.items()
    ]
    (found,) = stacks(members)
    return found


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def stacked_ratio(batch_size: int, pairs: int = 3) -> tuple[list[float], float, float]:
    """Times both in turn, whole attacks with their scores.

    Returns:
        The ratios; the largest difference of a loss; and how many of all scored samples, at least, were judged
        otherwise: one whose best two classes are equal up to rounding may be.
    """
    model, _, task = setting()
    members, run = group(model, task, batch_size), Run(device=CPU)
    curves: dict[str, list[Curve]] = {}

    def alone() -> None:
        curves["alone"] = [
            m.adversary.attack(m.model, m.task, budgets=BUDGETS, run=run, role=m.role, seed=m.seed) for m in members
        ]

    def together() -> None:
        curves["together"] = attack_together(members, budgets=BUDGETS, run=run)

    together()  # warms up
    ratios = [seconds(alone) / seconds(together) for _ in range(pairs)]
    scores, losses = (
        [abs(x - y) for a, b in zip(*curves.values(), strict=True) for x, y in zip(getter(a), getter(b), strict=True)]
        for getter in (lambda c: c.scores, lambda c: c.losses[1:])
    )
    return ratios, max(losses), statistics.fmean(scores)


def vmap_ratio(batch_size: int, pairs: int = 5, steps: int = 5) -> list[float]:
    """Forward and backward passes one by one over those of `vmap` with stacked parameters; no optimizer in either."""
    model, _, _ = setting()
    copies = [model.clone() for _ in range(30)]
    parameters, _ = stack_module_state(copies)  # type: ignore[arg-type]
    x, y = torch.rand(30, batch_size, 1, 8, 8), torch.randint(0, 5, (30, batch_size))

    def loss(values: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (inputs,)), targets)

    gradients = vmap(grad_and_value(loss))

    def together() -> None:
        for _ in range(steps):
            gradients(parameters, x, y)

    def alone() -> None:
        for _ in range(steps):
            for k, own in enumerate(copies):
                own.zero_grad(set_to_none=True)
                F.cross_entropy(own(x[k]), y[k]).backward()

    together()
    return [seconds(alone) / seconds(together) for _ in range(pairs)]


def overhead_ratios(pairs: int = 3) -> dict[str, list[float]]:
    """Times an audit, and the training steps of the same adversaries on the same models, in turn."""
    model, benign, task = setting()
    spec = AuditSpec(battery="quick-v1", budgets=(0, 100), seeds=2, side_effects=False, stacked=False)
    released = [model, model, model.fresh()] * spec.seeds
    adversaries = [a for a in battery("quick-v1") if isinstance(a, FineTuning)]

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            audit(model, model, benign=benign, restricted=task, spec=spec, run=Run(device=CPU, folder=Path(folder)))

    begun = [_begun(a, m, task) for m in released for a in adversaries]

    def bare() -> None:
        for work in begun:
            for _ in islice(work, 100):
                pass

    ratios: dict[str, list[float]] = {name: [] for name in CLOCKS}
    for _ in range(pairs):
        times = [[clock() for clock in CLOCKS.values()]]
        for work in (whole, bare):
            work()
            times.append([clock() for clock in CLOCKS.values()])
        for name, begin, middle, end in zip(CLOCKS, *times, strict=True):
            ratios[name].append((middle - begin) / (end - middle))
    return ratios


def _begun(adversary: FineTuning, model: SplitModel, task: ArrayTask) -> Iterator[Tensor]:
    own, generator = model.clone(), torch.Generator().manual_seed(0)
    next(adversary.run(own, task, benign=None, generator=generator, device=CPU))
    return finetune(own, task, adversary.strategy, generator=generator, device=CPU)


def main() -> int:
    """Measures, prints and writes; returns the exit code."""
    torch.set_num_threads(1)
    by_size = {size: stacked_ratio(size) for size in (20, 50)}
    plain, overhead = vmap_ratio(50), overhead_ratios()
    measured = {
        "one_by_one_over_stacked": statistics.median(by_size[50][0]),
        "one_by_one_over_stacked_batch_20": statistics.median(by_size[20][0]),
        "stacked_difference_of_losses": max(difference for _, difference, _ in by_size.values()),
        "stacked_samples_judged_otherwise": max(share for _, _, share in by_size.values()),
        "one_by_one_over_vmap": statistics.median(plain),
        "audit_over_bare_steps": statistics.median(overhead["wall"]),
        "audit_over_bare_steps_processor": statistics.median(overhead["processor"]),
    }
    missed = [name for name, limit in LIMITS.items() if measured[name] > limit]
    missed += [name for name, floor in FLOORS.items() if measured[name] < floor]
    for name, value in measured.items():
        goals: Sequence[str] = [f"at least {FLOORS[n]:g}" for n in FLOORS if n == name]
        goals = goals or [f"limit {LIMITS[n]:g}" for n in LIMITS if n == name] or ["(no limit)"]
        print(f"{name:36} {value:10.3g}   {goals[0]:14} {'MISSED' if name in missed else 'ok'}")
    result = {
        "ratios": measured,
        "floors": FLOORS,
        "limits": LIMITS,
        "stacked_ratio_pairs": {f"batch_{size}": sorted(ratios) for size, (ratios, *_) in by_size.items()},
        "vmap_ratio_pairs": sorted(plain),
        "overhead_ratio_pairs": {name: sorted(ratios) for name, ratios in overhead.items()},
        "setting": f"CNN without BatchNorm, digits 8x8, CPU; stacked: 30 members, Adam, budgets {BUDGETS}, batch 50; "
        "overhead: quick-v1, budgets (0, 100), 2 seeds",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    path = Path(__file__).with_name("results.json")
    whole = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**whole, "audit": result}, indent=1) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
