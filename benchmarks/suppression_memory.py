"""Memory of SOPHON's suppression loop on the kinds of networks that the paper has; see `make bench`.

- growth: peak memory of a simulation at K = 50 over that at K = 5, for ResNet-18 and CAFormer-S18 at 64 pixels.
- graph: what a simulation takes on top of the loaded model, over what the textbook way takes, which keeps the graph of
  all K = 20 steps (MAML). Two of them are measured: the whole one, which differentiates through the inner steps, and
  the frugal one, which takes their Jacobian as the identity, as SOPHON does. The latter has the same gradient as ours,
  and is compared with it.

Every point is a process of its own. Writes benchmarks/results.json and exits with 1 if a ratio is over its limit.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from holdfast.defenses.sophon.simulation import Simulation
from holdfast.losses import inverse_cross_entropy
from holdfast.models import SplitModel, load_model
from holdfast.tasks import ArrayTask
from holdfast.training import Strategy

LIMITS = {
    "resnet18_k50_over_k5": 1.15,
    "resnet18_k50_over_k5_above_start": 1.15,
    "caformer_s18_k50_over_k5": 1.15,
    "caformer_s18_k50_over_k5_above_start": 1.15,
    "extra_over_maml": 0.35,
    "extra_over_first_order_graph": 0.35,
}
BATCH, PIXELS, LEARNING_RATE = 16, 64, 1e-3
GRAPH_STEPS = 20


def setting(name: str) -> tuple[SplitModel, ArrayTask]:
    """A model of timm on random images: memory does not depend on what is in them."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (320, PIXELS, PIXELS, 3), dtype=np.uint8), np.arange(320) % 10
    task = ArrayTask("random", x, y, x[:10], y[:10])
    torch.manual_seed(0)
    return load_model(f"timm:{name}", task), task


def ours(model: SplitModel, task: ArrayTask, steps: int, optimizer: str) -> list[Tensor | None]:
    """The meta-gradient by `Simulation`."""
    simulation = Simulation(model, inverse_cross_entropy)
    strategy = Strategy("direct", "all", optimizer, LEARNING_RATE, BATCH)
    simulation.run(task, strategy, steps, None, generator=torch.Generator().manual_seed(0))
    return simulation.gradients()


def graph(model: SplitModel, task: ArrayTask, steps: int, *, first_order: bool) -> list[Tensor | None]:
    """The meta-gradient by one backward pass through the graph of all steps, in a handful of lines."""
    model.train()
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    training = task.batches("train", BATCH, generator=generator, device=device)
    evaluation = task.batches("train", BATCH, generator=generator, device=device)
    start = dict(model.named_parameters())
    moved: dict[str, Tensor] = dict(start)
    total = torch.zeros(())
    for _ in range(steps):
        batch = next(training)
        loss = F.cross_entropy(functional_call(model, moved, (batch.x,)), batch.y)
        grads = torch.autograd.grad(loss, list(moved.values()), create_graph=not first_order)
        moved = {n: p - LEARNING_RATE * g for (n, p), g in zip(moved.items(), grads, strict=True)}
        batch = next(evaluation)
        total = total + inverse_cross_entropy(functional_call(model, moved, (batch.x,)), batch.y)
    return list(torch.autograd.grad(total, list(start.values())))


WAYS: dict[str, Callable[[SplitModel, ArrayTask, int], list[Tensor | None]]] = {
    "ours": lambda model, task, steps: ours(model, task, steps, "adam"),
    "ours-sgd": lambda model, task, steps: ours(model, task, steps, "sgd"),
    "maml": lambda model, task, steps: graph(model, task, steps, first_order=False),
    "first-order-graph": lambda model, task, steps: graph(model, task, steps, first_order=True),
}


def point(way: str, name: str, steps: int) -> dict[str, float]:
    """Measures one way in a process of its own: KiB at its peak and above the loaded model, a gradient's length."""
    command = [sys.executable, __file__, "--point", way, name, str(steps)]
    begin = time.perf_counter()
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"  {way:18} {name:13} K = {steps:2}  peak {found['peak'] / 1024:7.0f} MiB, "
        f"above the model {found['extra'] / 1024:7.0f} MiB  ({time.perf_counter() - begin:.0f} s)",
        flush=True,
    )
    return found


def _print_point(way: str, name: str, steps: int) -> None:
    model, task = setting(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here: making a model takes more than it
    begin = _status("VmRSS")
    found = WAYS[way](model, task, steps)
    peak = _status("VmHWM")
    length = float(torch.stack([g.double().norm() for g in found if g is not None]).norm())
    print(json.dumps({"peak": peak, "extra": peak - begin, "gradient": length}))


def _status(entry: str) -> int:
    """KiB of this process by the kernel's account (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def main() -> int:
    """Measures, prints and writes; returns the exit code."""
    measured: dict[str, float] = {}
    points: dict[str, dict[str, float]] = {}
    for name in ("resnet18", "caformer_s18"):
        few, many = (point("ours", name, steps) for steps in (5, 50))
        points |= {f"{name}_k5": few, f"{name}_k50": many}
        measured[f"{name}_k50_over_k5"] = many["peak"] / few["peak"]
        measured[f"{name}_k50_over_k5_above_start"] = many["extra"] / few["extra"]
    plain, maml, frugal = (point(way, "resnet18", GRAPH_STEPS) for way in ("ours-sgd", "maml", "first-order-graph"))
    points |= {"resnet18_k20_sgd": plain, "resnet18_k20_maml": maml, "resnet18_k20_first_order_graph": frugal}
    measured["extra_over_maml"] = plain["extra"] / maml["extra"]
    measured["extra_over_first_order_graph"] = plain["extra"] / frugal["extra"]
    same = abs(plain["gradient"] / frugal["gradient"] - 1) < 1e-3
    for name, value in measured.items():
        print(f"{name:38} {value:6.3f}   limit {LIMITS[name]:.2f}   {'ok' if value <= LIMITS[name] else 'OVER'}")
    print(f"gradient's length {plain['gradient']:.6g}, of the first-order graph {frugal['gradient']:.6g}: ", end="")
    print("the same" if same else "NOT the same")
    result = {
        "ratios": measured,
        "limits": LIMITS,
        "points_kib": points,
        "setting": f"{PIXELS}x{PIXELS}, batch {BATCH}, Adam (growth) and SGD (graph), CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    path = Path(__file__).with_name("results.json")
    whole = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**whole, "suppression_memory": result}, indent=1) + "\n")
    return int(not same or any(measured[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        _print_point(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(main())
