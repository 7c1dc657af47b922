"""What `test_distributed.py` lets two processes do under `accelerate launch`: each writes what it found as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from holdfast.cli.main import main
from holdfast.defenses import NTL, TAR, RepNoise, Sophon
from holdfast.defenses.ntl import _Immunization
from holdfast.defenses.trainer import Immunization
from holdfast.errors import HoldfastError
from holdfast.models import load_model
from holdfast.runtime.devices import resolve_device
from holdfast.runtime.distributed import ProcessGroup, alone, process_group
from holdfast.runtime.executors import executor
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run
from holdfast.runtime.storage import tensors_sha256
from holdfast.tasks import load_task
from holdfast.training import pretrain

CPU = torch.device("cpu")


def gradient(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """A layer with a BatchNorm behind it, with the gradient of a batch; the weights are the same each time."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    nn.functional.cross_entropy(layer(x), y).backward()
    return layer


def averages(group: ProcessGroup) -> dict[str, object]:
    torch.manual_seed(5)
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    half = slice(4 * group.rank, 4 * group.rank + 4)
    mine, union = gradient(x[half], y[half]), gradient(x, y)
    alone_there = [p.grad.clone() for p in mine.parameters()]
    group.average_gradients(mine.parameters())
    partly = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(3)])
    partly[0].grad = torch.full((2,), 4.0) if group.main else None  # and none has one of the last
    partly[1].grad = torch.full((2,), float(group.rank))
    group.average_gradients(partly)
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(2.0 * group.rank)
    group.sync_buffers(norm)
    torch.manual_seed(group.rank)
    weights = nn.Linear(2, 2)
    at_first = tensors_sha256(weights.state_dict())
    group.broadcast_state(weights)
    return {
        "own weights": at_first,
        "differed before": any(
            not torch.allclose(a, p.grad) for a, p in zip(alone_there, union.parameters(), strict=True)
        ),
        "union": all(
            torch.allclose(p.grad, q.grad, atol=1e-7)
            for p, q in zip(mine.parameters(), union.parameters(), strict=True)
        ),
        "partly": [None if p.grad is None else p.grad.tolist() for p in partly],
        "statistics": norm.running_mean.tolist(),
        "followed": tensors_sha256(weights.state_dict()),
    }


def fails_on_main() -> None:
    raise HoldfastError("rows is 1; expected at least 2.")


def said(work) -> str:
    try:
        work()
    except (HoldfastError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def talks(group: ProcessGroup, folder: Path) -> dict[str, object]:
    journal = Journal(folder / "checkpoints" / "talks.jsonl", {"seed": 1})
    for index, value in executor("serial").run(lambda _, job: job**2 + 100 * process_group().count, None, [1, 2, 3]):
        journal.add(str(index), value)
    again = Journal(journal.path, {"seed": 1})
    return {
        "agreed": group.broadcast_object(f"said by {group.rank}"),
        "gathered": group.gather(group.rank),
        "raised": said(lambda: group.on_main_process(fails_on_main)),
        "job raised": said(lambda: list(executor("serial").run(lambda _, job: 1 // job, None, [1, 0, 2]))),
        "workers": said(lambda: executor("processes")),
        "device": said(lambda: resolve_device("cuda:7")),
        "other job": said(lambda: Journal(journal.path, {"seed": 2})),
        "entries": again.entries,
        "lines": len(journal.path.read_text().splitlines()),
    }


class _Forgets(_Immunization):
    """NTL that takes its own steps only."""

    def average_gradients(self) -> None:
        pass


class _Killed(Exception):
    pass


def trains(folder: Path) -> dict[str, object]:
    benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
    run = Run(0, CPU)
    with run.seeded("initialise"):
        fresh = load_model("cnn", benign)
    original = pretrain(fresh, benign, steps=10, run=run)
    with alone():
        by_one = pretrain(fresh, benign, steps=10, run=run)
    lasting = Sophon(
        iterations=4, steps=2, tasks=2, population=3, lifetime=3, batch_sizes=(20,), reinforcement_batch=32,
        guard_every=1, ema=0.5, validate_every=2, validation_steps=2, max_benign_drop=1.0,
    )  # fmt: skip
    whole, record = lasting.immunize(original, benign, restricted, run=run)
    resumable = Run(0, CPU, folder / "killed")

    def kill(self: Immunization, score: float) -> None:
        keep(self, score)
        if self.round == 3:
            raise _Killed

    keep, Immunization.keep = Immunization.keep, kill
    try:
        lasting.immunize(original, benign, restricted, run=resumable)
    except _Killed:
        pass
    finally:
        Immunization.keep = keep
    resumed, _ = lasting.immunize(original, benign, restricted, run=resumable)
    ntl = NTL(iterations=3, batch_size=20, guard_every=1, max_benign_drop=1.0)
    brief = {"iterations": 3, "batch_size": 20, "guard_every": 1, "max_benign_drop": 1.0}
    others = {"tar": TAR(steps=4, batch_sizes=(20,), **brief), "repnoise": RepNoise(**brief)}
    forgets = _Forgets(ntl, original, benign, restricted, run, rate=1e-3)
    with alone():
        other_count = said(lambda: lasting.immunize(original, benign, restricted, run=resumable))
    return {
        "pretrained": original.facts().sha256,
        "by one": by_one.facts().sha256,
        "immunized": whole.facts().sha256,
        "history": record.history,
        "resumed": resumed.facts().sha256,
        "killed at": len(list((folder / "killed").rglob("*.safetensors"))),
        "ntl": ntl.immunize(original, benign, restricted, run=run)[0].facts().sha256,
        **{n: d.immunize(original, benign, restricted, run=run)[0].facts().sha256 for n, d in others.items()},
        "forgotten": said(forgets.finish),
        "other count": other_count,
    }


RECIPE = """
title: two processes
seed: 0
threads: 1
model: {name: cnn}
pretrain: {steps: 10}
benign: {data: "digits[0-6]"}
restricted: {data: "digits[7-9]", test_limit: 30}
defense: {name: sophon, iterations: 2, steps: 2, batch_sizes: [20], reinforcement_batch: 32, guard_every: 1}
audit: {battery: quick-v1, budgets: [0, 2], seeds: 1, shots: 2, side_effects: false}
"""


def runs_a_recipe(folder: Path) -> dict[str, object]:
    """`holdfast run`, twice: the second time it is done already."""
    if process_group().main:
        (folder / "two.yaml").write_text(RECIPE)
    codes = []
    for _ in range(2):
        try:
            main(["run", str(folder / "two.yaml"), "--out", str(folder / "run")])
        except SystemExit as end:
            codes.append(end.code)
    return {"codes": codes}


def threads_that_outlive_the_group() -> list[str]:
    """What still runs when the group of processes has ended; such a thread may abort Python on its way out."""
    state = PartialState()
    state.destroy_process_group()
    names = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    place, group = Path(sys.argv[1]), process_group()
    torch.set_num_threads(1)
    found = {"team": [group.rank, group.count], "averages": averages(group), "talks": talks(group, place)}
    found |= {"trains": trains(place), "recipe": runs_a_recipe(place)}
    found["outlived"] = threads_that_outlive_the_group()
    (place / f"{group.rank}.json").write_text(json.dumps(found))
