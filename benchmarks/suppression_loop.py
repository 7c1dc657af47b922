"""Two ratios that must hold for SOPHON's suppression loop, of a classifier, a denoiser and a causal language model.

- memory: peak memory of a simulation at K = 50 over that at K = 5. Memory must not grow with the number of steps.
- time: a suppression loop over the bare forward and backward passes that it cannot do without.

See `make bench`. With the name of a kind it measures that alone, with `frozen` what frozen blocks save, with `small`
what smaller images save, and with `stacked` what several adversaries in one batch would save; then it writes nothing.
Otherwise it writes benchmarks/results.json. It exits with 1 if a ratio is over its limit.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from holdfast.defenses import Sophon
from holdfast.defenses.sophon.frozen_blocks import behind_frozen_blocks
from holdfast.defenses.sophon.simulation import Simulation
from holdfast.losses import denial_of_service, inverse_cross_entropy
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.tasks import ArrayTask, DenoisingTask, InMemoryTask, NextTokenTask, load_tokenizer
from holdfast.training import Strategy

LIMITS = {"memory_k50_over_k5": 1.15, "memory_k50_over_k5_above_start": 1.15, "time_over_bare_passes": 1.10}
BATCH, TOKENS = 50, 64
LOSSES = {
    "classifier": (F.cross_entropy, inverse_cross_entropy),
    "denoiser": (F.mse_loss, denial_of_service),
    "language": (F.cross_entropy, inverse_cross_entropy),
}
"""Of fine-tuning and of suppression."""


def setting(kind: str) -> tuple[SplitModel, InMemoryTask]:
    """ResNet-20, a small U-Net or a small Llama on random data: speed does not depend on what is in them."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8), np.arange(1000) % 10
    task = ArrayTask("random", x, y, x[:10], y[:10])
    torch.manual_seed(0)
    if kind == "language":
        ids = rng.integers(2, 258, (400, TOKENS + 1))
        rows = ids[:, :-1], ids[:, 1:]
        tokens = NextTokenTask("random", rows, rows, vocabulary=load_tokenizer("bytes").vocabulary)
        return load_model(ModelSpec(name="llama", options={"width": 64, "depth": 4, "heads": 4}), tokens), tokens
    if kind == "denoiser":
        task = DenoisingTask.of(task)
    return load_model(ModelSpec(name="unet" if kind == "denoiser" else "cifar_resnet"), task), task


def simulate(model: SplitModel, task: InMemoryTask, simulation: Simulation, steps: int) -> None:
    """One suppression loop's simulation, without the update of the model."""
    strategy = Strategy("direct", "all", "adam", 1e-3, BATCH)
    simulation.zero()
    simulation.run(task, strategy, steps, None, generator=torch.Generator().manual_seed(0))


def bare(kind: str, model: SplitModel, task: InMemoryTask, steps: int) -> None:
    """The passes alone: one forward and backward on a fine-tuning batch, one on an evaluation batch, for each step."""
    stream = task.batches("train", BATCH, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    model.train()
    for _ in range(steps):
        for loss in LOSSES[kind]:
            batch = next(stream)
            model.zero_grad(set_to_none=True)
            loss(*task.counted(model(batch.x), batch.y)).backward()


def time_ratio(kind: str, pairs: int = 9, steps: int = 10) -> list[float]:
    """Times both in turn, so that a change of the machine's speed hits both."""
    model, task = setting(kind)
    simulation, plain = Simulation(model, LOSSES[kind][1]), model.clone()
    ratios = []
    for i in range(pairs + 1):
        begin = time.perf_counter()
        simulate(model, task, simulation, steps)
        middle = time.perf_counter()
        bare(kind, plain, task, steps)
        if i:  # the first pair warms up
            ratios.append((middle - begin) / (time.perf_counter() - middle))
    return ratios


def peak_memory(kind: str, steps: int) -> tuple[int, int]:
    """Peak memory in KiB of a process that simulates so many steps: whole, and above where the simulation began."""
    command = [sys.executable, __file__, "--peak", kind, str(steps)]
    begin, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(peak), int(peak) - int(begin)


def _print_peak(kind: str, steps: int) -> None:
    model, task = setting(kind)
    begin = _status("VmRSS")
    simulate(model, task, Simulation(model, LOSSES[kind][1]), steps)
    print(begin, _status("VmHWM"))


def _status(entry: str) -> int:
    """KiB of this process by the kernel's account (Linux); getrusage would report the parent's peak after a fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def measure(kind: str) -> tuple[dict[str, float], dict[str, object]]:
    """Returns the ratios of one kind of model, and what they were made of."""
    times = time_ratio(kind)
    few, many = peak_memory(kind, 5), peak_memory(kind, 50)
    measured = {
        "memory_k50_over_k5": many[0] / few[0],
        "memory_k50_over_k5_above_start": many[1] / few[1],
        "time_over_bare_passes": statistics.median(times),
    }
    print(kind)
    for name, value in measured.items():
        print(f"  {name:32} {value:6.3f}   limit {LIMITS[name]:.2f}   {'ok' if value <= LIMITS[name] else 'OVER'}")
    print(f"  {'(time, lowest and highest pair)':32} {min(times):6.3f} {max(times):6.3f}", flush=True)
    peaks = {"k5": few[0], "k50": many[0], "k5_above_start": few[1], "k50_above_start": many[1]}
    return measured, {"ratios": measured, "time_ratio_pairs": sorted(times), "peak_kib": peaks}


def frozen(blocks: int, pairs: int = 7, steps: int = 10) -> list[float]:
    """Times of a simulation on all blocks of the ResNet-20 over those on the last blocks alone, in turn."""
    model, task = setting("classifier")
    left = behind_frozen_blocks(Sophon(), blocks, 8.0, model, task, task)
    ratios = compare((model, task), left[:2], pairs, steps)
    report(f"all blocks over the last {blocks} of {len(model.blocks())}", ratios)
    return ratios


def small(size: int, pairs: int = 7, steps: int = 10) -> list[float]:
    """Times of a simulation on the ResNet-20 with images of 32 pixels over those with smaller ones, in turn."""
    model, task = setting("classifier")
    ratios = compare((model, task), (model, task.as_images(size)), pairs, steps)
    report(f"images of 32 over {size} pixels", ratios)
    return ratios


def compare(
    first: tuple[SplitModel, InMemoryTask], second: tuple[SplitModel, InMemoryTask], pairs: int, steps: int
) -> list[float]:
    """Times of a classifier's simulation over those of another, in turn; the first pair warms up."""
    sides = [(model, task, Simulation(model, LOSSES["classifier"][1])) for model, task in (first, second)]
    ratios = []
    for i in range(pairs + 1):
        times = []
        for each, data, simulation in sides:
            begin = time.perf_counter()
            simulate(each, data, simulation, steps)
            times.append(time.perf_counter() - begin)
        if i:
            ratios.append(times[0] / times[1])
    return ratios


def report(what: str, ratios: list[float]) -> None:
    """Prints the median, and the lowest and the highest pair."""
    print(f"{what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def stacked(name: str, size: int, copies: int = 4, pairs: int = 7) -> list[float]:
    """Times of a pass over copies of a network one after another over those of torch.func on all at once, in turn."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((copies, BATCH, 3, size, size), dtype=np.float32))
    y = torch.from_numpy(rng.integers(0, 10, (copies, BATCH)))
    images = (rng.random((20, size, size, 3)) * 255).astype(np.uint8)
    task = ArrayTask("random", images, np.arange(20) % 10, images, np.arange(20) % 10)
    torch.manual_seed(0)
    networks = [load_model(ModelSpec(name=name), task).train().network for _ in range(copies)]
    weights, buffers = stack_module_state(networks)

    def loss(w: dict[str, Tensor], b: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(networks[0], (w, {k: v.clone() for k, v in b.items()}), inputs), labels)

    together = vmap(grad(loss), randomness="different")
    ratios = []
    for i in range(pairs + 1):
        begin = time.perf_counter()
        for network, inputs, labels in zip(networks, x, y, strict=True):
            network.zero_grad(set_to_none=True)
            F.cross_entropy(network(inputs), labels).backward()
        middle = time.perf_counter()
        together(weights, buffers, x, y)
        if i:
            ratios.append((middle - begin) / (time.perf_counter() - middle))
    report(f"{copies} copies of {name} in turn over at once", ratios)
    return ratios


def main() -> int:
    """Measures, prints and writes; returns the exit code."""
    found = {kind: measure(kind) for kind in LOSSES}
    result = {
        "limits": LIMITS,
        **{kind: details for kind, (_, details) in found.items()},
        "setting": f"ResNet-20 and a small U-Net (16, 32, 32), 32x32; a Llama of width 64 and 4 layers, {TOKENS} "
        f"tokens; batch {BATCH}, Adam, CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    path = Path(__file__).with_name("results.json")
    whole = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**whole, "suppression_loop": result}, indent=1) + "\n")
    return int(any(ratios[name] > limit for ratios, _ in found.values() for name, limit in LIMITS.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        _print_peak(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:] == ["frozen"]:
        for count in (6, 3):
            frozen(count)
    elif sys.argv[1:] == ["small"]:
        small(16)
    elif sys.argv[1:] == ["stacked"]:
        for built_in, pixels in (("cnn", 14), ("cifar_resnet", 32)):
            stacked(built_in, pixels)
    elif sys.argv[1:]:
        alone, _ = measure(sys.argv[1])
        sys.exit(int(any(alone[name] > limit for name, limit in LIMITS.items())))
    else:
        sys.exit(main())
