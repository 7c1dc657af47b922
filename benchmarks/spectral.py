"""Three ratios that must hold for the spectral code, each measured in one run; see `make bench`.

- step: a step of Algorithm 1, line 6, as its equations say (tests/reference.py: D x D Hessians by eigen-decomposition,
  K + I solved densely), over the same step through the features' small side and `PreconditionedLinear`. At least 10.
- streaming: `LeastSquares.stream(..., method="gram")` over adding up X'X alone, on the same batches.
- memory: peak memory of streaming 100 batches over that of 10, and over one Gram matrix with one batch. Memory must not
  grow with the stream.

Merges them into benchmarks/results.json under "spectral", and exits with 1 if a ratio is over its limit.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.preconditioning import PreconditionedLinear, Preconditioner
from holdfast.spectral.regularizers import r_ill_of_features, r_well_of_features

FLOORS = {"naive_step_over_step": 10.0}
LIMITS = {
    "gram_stream_over_bare_gram": 1.3,
    "memory_100_batches_over_10": 1.1,
    "memory_100_batches_over_10_above_start": 1.15,
    "memory_above_start_over_gram_and_batch": 6.0,
}
WIDTH, BATCH, RIDGE = 784, 64, 1.0
BATCHES, ROWS = 40, 1000
METHODS = ("gram", "qr")


def step_setting() -> tuple[Tensor, Tensor, Tensor]:
    """An extractor and a batch of each task, of MNIST's shape: speed does not depend on what is in them."""
    torch.manual_seed(0)
    theta = torch.eye(WIDTH, dtype=torch.float64) + 0.01 * torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    benign, restricted = torch.rand(2, BATCH, WIDTH, dtype=torch.float64)
    return theta, benign, restricted


def step(theta: Tensor, benign: Tensor, restricted: Tensor) -> Tensor:
    """Algorithm 1, line 6, without the supervised loss; returns the new extractor."""
    layer = PreconditionedLinear(theta)
    well = r_well_of_features(layer(benign, Preconditioner(benign, RIDGE)))
    ill = r_ill_of_features(layer(restricted, Preconditioner(restricted, RIDGE)))
    (well + ill).backward()
    assert layer.theta.grad is not None
    return theta - 1e-6 * layer.theta.grad


def naive_step(theta: Tensor, benign: Tensor, restricted: Tensor) -> Tensor:
    """The same by the slow twin that the tests use."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import reference

    sys.path.pop(0)
    none = torch.zeros_like(theta)
    ridges = (RIDGE, RIDGE)
    return reference.algorithm_1_line_6(theta, none, benign, restricted, rate=1e-6, weights=(1.0, 1.0), ridges=ridges)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def step_ratio(pairs: int = 7) -> list[float]:
    """Times both in turn, so that a change of the machine's speed hits both."""
    setting = step_setting()
    theta, fast, slow = setting[0], step(*setting), naive_step(*setting)  # warms up
    difference = ((fast - slow).norm() / (slow - theta).norm()).item()
    assert difference < 1e-6, f"the two steps differ by {difference:.1e}"
    return [seconds(lambda: naive_step(*setting)) / _mean(lambda: step(*setting), 10) for _ in range(pairs)]


def _mean(call: Callable[[], object], times: int) -> float:
    return seconds(lambda: [call() for _ in range(times)]) / times


def stream_ratio(pairs: int = 9) -> list[float]:
    """Batches in float64 lie ready, so that nothing but the accumulation is timed; both begin alternately."""
    torch.manual_seed(0)
    batches = [torch.randn(ROWS, WIDTH, dtype=torch.float64) for _ in range(BATCHES)]

    def bare() -> None:
        gram = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for x in batches:
            gram += x.T @ x

    def stream() -> None:
        LeastSquares.stream(((x, None) for x in batches), method="gram")

    ratios = []
    for i in range(pairs + 1):
        first, second = (bare, stream) if i % 2 else (stream, bare)
        times = {first: seconds(first), second: seconds(second)}
        if i:  # the first pair warms up
            ratios.append(times[stream] / times[bare])
    return ratios


def peak_memory(batches: int, method: str) -> tuple[int, int]:
    """Peak memory in KiB of a process that streams so many batches: whole, and above where the streaming began."""
    command = [sys.executable, __file__, "--peak", str(batches), method]
    # glibc otherwise keeps freed blocks of this size, and how many is a matter of chance: count what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    begin, peak = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()
    return int(peak), int(peak) - int(begin)


def _print_peak(batches: int, method: str) -> None:
    def random(count: int) -> Iterator[tuple[Tensor, None]]:
        for _ in range(count):
            yield torch.randn(ROWS, WIDTH, dtype=torch.float64), None

    torch.linalg.eigh(torch.eye(WIDTH, dtype=torch.float64))  # loads LAPACK, which is no part of the stream
    begin = _status("VmRSS")
    LeastSquares.stream(random(batches), method="gram" if method == "gram" else "qr")
    print(begin, _status("VmHWM"))


def _status(entry: str) -> int:
    """KiB of this process by the kernel's account (Linux); getrusage would report the parent's peak after a fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def main() -> int:
    """Measures, prints and writes; returns the exit code."""
    steps, streams = step_ratio(), stream_ratio()
    peaks = {f"{method}_{n}": peak_memory(n, method) for method in METHODS for n in (10, 100)}
    unit = 8 * WIDTH * (WIDTH + ROWS) / 1024
    measured = {
        "naive_step_over_step": statistics.median(steps),
        "gram_stream_over_bare_gram": statistics.median(streams),
        "memory_100_batches_over_10": max(peaks[f"{m}_100"][0] / peaks[f"{m}_10"][0] for m in METHODS),
        "memory_100_batches_over_10_above_start": max(peaks[f"{m}_100"][1] / peaks[f"{m}_10"][1] for m in METHODS),
        "memory_above_start_over_gram_and_batch": max(peaks[f"{m}_100"][1] / unit for m in METHODS),
    }
    missed = [name for name, limit in LIMITS.items() if measured[name] > limit]
    missed += [name for name, floor in FLOORS.items() if measured[name] < floor]
    for name, value in measured.items():
        goal = f"at least {FLOORS[name]:.2f}" if name in FLOORS else f"limit {LIMITS[name]:.2f}"
        print(f"{name:40} {value:6.3f}   {goal:15} {'MISSED' if name in missed else 'ok'}")
    print(f"{'(step, lowest and highest pair)':40} {min(steps):6.3f} {max(steps):6.3f}")
    print(f"{'(streaming, lowest and highest pair)':40} {min(streams):6.3f} {max(streams):6.3f}")
    result = {
        "ratios": measured,
        "floors": FLOORS,
        "limits": LIMITS,
        "step_ratio_pairs": sorted(steps),
        "stream_ratio_pairs": sorted(streams),
        "peak_kib": {name: {"whole": whole, "above_start": above} for name, (whole, above) in peaks.items()},
        "setting": f"D = {WIDTH}, float64, CPU; step: batch {BATCH}, ridge {RIDGE:g}; stream: batches of {ROWS}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    path = Path(__file__).with_name("results.json")
    whole = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**whole, "spectral": result}, indent=1) + "\n")
    return int(bool(missed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        _print_peak(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
