"""Candidates for a battery `standard-v2`, on every sham of images in the zoo and on real defended models, and a cover.

    python benchmarks/choose_standard.py measure FOLDER [--models RUN --data DIR] [--part 1/2]
    python benchmarks/choose_standard.py choose FOLDER [--out PAGE.md]

Candidates are the members of `standard-v1`, the openings and answers of `adaptive-v2`, the answers of the zoo's shams,
and some more. `measure` attacks every victim with each of them, with three seeds, and writes a JSON line each; what is
there already is not run again, and parts may run beside each other. `--models` adds the immunized models of a finished
run of `trajectory-erasure/trade-off`. `choose` keeps adding the candidate that adds most to the best-of-battery score,
averaged over victims and budgets, shams and others with the same weight, and stops when none adds 0.1 points. It does
so for the mean of three seeds, and for each seed alone, scored on the others.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from holdfast.adversaries import SEARCHES, Adversary, DirectionalAblation, FineTuning, Probe, Unlabelled, listed
from holdfast.defenses import NTL, SignalFrontier, Sophon, TrajectoryErasure
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, architecture_differences, load_model, transplant
from holdfast.runtime.run import Run
from holdfast.tasks import Task, TaskSpec, load_task
from holdfast.tasks.splits import halves
from holdfast.training import Strategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo  # it belongs to the tests

LEAST_GAIN = 0.001
SEEDS = (0, 1, 2)
Scores = dict[str, dict[tuple[str, int], list[float]]]
"""By adversary: the best score so far at each budget, by victim and seed."""


@dataclass(frozen=True)
class Victim:
    """A model to attack, and what the adversary has.

    Attributes:
        name: after `sham: `, `real: ` or `control: `.
        model: the model.
        benign: its own task.
        restricted: the adversary's half.
        shots: samples a class.
        budgets: steps.
    """

    name: str
    model: SplitModel
    benign: Task
    restricted: Task
    shots: int
    budgets: tuple[int, ...]


def candidates() -> list[Adversary]:
    """Every adversary that may become a member, without duplicates."""
    search = SEARCHES["adaptive-v2"]
    points = [*search.openings, *(point for answers in search.answers.values() for point in answers)]
    head = Strategy("head", "all", "adam", 1e-3, 50)
    long = Strategy("head", "all", "adam", 1e-3, 50, schedule="cosine", schedule_steps=50, warmup=5)
    found = [
        *listed("standard-v1"),
        *listed("quick-v2"),
        *(search.make({**search.default, **point}) for point in points),
        *(row.answer for row in zoo.ZOO.values() if row.domain == "vision"),
        FineTuning(long),
        FineTuning(head, replay=0.5),
        FineTuning(head, benign_floor=0.9),
        FineTuning(head, undo=("round-int8",)),
        FineTuning(head, undo=("mirror-inputs",)),
        FineTuning(head, undo=("grey-inputs",)),
        FineTuning(head, undo=("renormalise-inputs",)),
        FineTuning(head, undo=("renew-quarter-4",)),
        Unlabelled(head),
        DirectionalAblation(head),
        Probe("newton", "raw"),
    ]
    return list({adversary.name: adversary for adversary in found}.values())


def victims(models: Path | None, data: Path | None) -> Iterator[Victim]:
    """The shams of images, an original, a fresh network, and defended models."""
    for name, row in zoo.ZOO.items():
        if row.domain == "vision":
            case = zoo.case(name)
            own, setting = case.model, case.setting
            inside = transplant(own, case.original) if architecture_differences(own, case.original) else None
            yield Victim(
                f"sham: {name}", inside or own, setting.benign, setting.restricted, setting.shots, setting.budgets
            )
    setting, run = zoo.SETTINGS["batch"], Run(seed=0, device=torch.device("cpu"))
    tasks = setting.benign, setting.defender
    brief = {"iterations": 60, "steps": 10, "batch_sizes": (20,), "guard": False}
    defenses = {
        "SOPHON": Sophon(**brief, learning_rates=(1e-4, 1e-3, 1e-2)),
        "trajectory erasure": TrajectoryErasure(**brief, recovery_loops=0),
        "NTL": NTL(iterations=200),
        "signal frontier": SignalFrontier(epsilon=1e-3),
    }
    with run.seeded("initialise"):
        found = {"control: scratch": setting.original.fresh(), "control: original": setting.original}
    for name, defense in defenses.items():
        found[f"real: {name}"], _ = defense.immunize(setting.original, *tasks, run=run)
    for name, model in found.items():
        yield Victim(name, model, setting.benign, setting.restricted, 2, setting.budgets)
    if models is not None:
        yield from released(models, data)


def released(folder: Path, data: Path | None) -> Iterator[Victim]:
    """The immunized models of a run of `trajectory-erasure/trade-off`, five samples a class."""
    benign, restricted = (
        load_task(TaskSpec(data=f"mnist[{which}]", image_size=14, test_limit=400), data_dir=data)
        for which in ("0-4", "5-9")
    )
    for file in sorted(folder.glob("checkpoints/immunized/*.safetensors")):
        made_of = json.loads(file.with_suffix(".json").read_text())["made_of"]
        name = f"real: {made_of['defense']}, MNIST, {file.stem[:6]}"
        yield Victim(name, load_model(str(file), benign), benign, halves(restricted)[1], 5, (0, 10, 20, 50))


def measure(folder: Path, models: Path | None, data: Path | None, part: tuple[int, int]) -> None:
    run = Run(seed=0, device=torch.device("cpu"))
    path = folder / f"{part[0]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done = {(r["victim"], r["name"], r["seed"]) for r in rows(folder)}
    everything = list(victims(models, data))
    shuffled = random.Random(0).sample(whole := candidates(), len(whole))
    # By seed and in random order, so that an interrupted run compares a fair part.
    jobs = [(seed, adversary, victim) for seed in SEEDS for adversary in shuffled for victim in everything]
    for seed, adversary, victim in jobs[part[0] - 1 :: part[1]]:
        if (victim.name, adversary.name, seed) in done:
            continue
        with path.open("a") as file:
            file.write(json.dumps(attacked(adversary, victim, seed, run)) + "\n")


def attacked(adversary: Adversary, victim: Victim, seed: int, run: Run) -> dict:
    """The scores of an attack; of one that does not apply or does not work, the reason."""
    row = {"victim": victim.name, "name": adversary.name, "seed": seed}
    few = victim.restricted.few_shot(victim.shots, seed)
    reason = adversary.not_applicable(victim.model, few)
    if reason is not None:
        return {**row, "reason": reason}
    try:
        curve = adversary.attack(victim.model, few, budgets=victim.budgets, run=run, seed=seed, benign=victim.benign)
    except HoldfastError as error:  # a foreign forward pass may fail
        return {**row, "reason": str(error)}
    return {**row, "scores": curve.scores[1:]}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def table(folder: Path) -> Scores:
    """Scores of the candidates that were tried on every victim; what does not apply there has 0.

    Victims have equally many: one with fewer budgets counts the last of them more than once.
    """
    found: Scores = {}
    measured = list(rows(folder))
    width = max(len(row.get("scores", [])) for row in measured)
    for row in measured:
        found.setdefault(row["name"], {})[row["victim"], row["seed"]] = best_so_far(row.get("scores"), width)
    most = max(len(scores) for scores in found.values())
    return {name: scores for name, scores in found.items() if len(scores) == most}


def best_so_far(scores: list[float | None] | None, width: int) -> list[float]:
    """The best score up to each budget, as an adversary may stop early; zeros for one that does not apply."""
    known = [score or 0.0 for score in scores or [0.0]]
    return [max(known[: i + 1]) for i in range(width)]


def stacked(scores: Scores, seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """By adversary: scores of shape (victims, seeds, budgets), shams first, weighted so that both kinds count alike."""
    names = sorted({victim for by_cell in scores.values() for victim, _ in by_cell})
    shams = sum(name.startswith("sham") for name in names)
    share = torch.tensor([0.5 / shams if n.startswith("sham") else 0.5 / (len(names) - shams) for n in names])
    return {
        name: share[:, None, None] * torch.tensor([[by_cell[victim, seed] for seed in seeds] for victim in names])
        for name, by_cell in scores.items()
    }


def cover(values: dict[str, torch.Tensor]) -> list[tuple[str, float, float]]:
    """The greedy cover: names in order, with the best score so far and the gain."""
    chosen: list[tuple[str, float, float]] = []
    covered = torch.zeros_like(next(iter(values.values())))
    while True:
        name, score = max(((n, mean(v.maximum(covered))) for n, v in values.items()), key=lambda pair: pair[1])
        gain = score - mean(covered)
        if gain < LEAST_GAIN:
            return chosen
        covered = covered.maximum(values[name])
        chosen.append((name, score, gain))


def victims_in(scores: Scores) -> int:
    """Number of victims."""
    return len({victim for by_cell in scores.values() for victim, _ in by_cell})


def mean(values: torch.Tensor) -> float:
    """Over victims by their weights, seeds and budgets."""
    return float(values.sum(0).mean())


def best(values: dict[str, torch.Tensor], names: list[str]) -> float:
    """The best-of-battery score of some adversaries."""
    return mean(torch.stack([values[name] for name in names if name in values]).amax(0))


def choose(folder: Path) -> str:
    """The page: the cover, how it depends on the seed, and the shares of other batteries."""
    scores = table(folder)
    whole = stacked(scores, SEEDS)
    chosen = cover(whole)
    lines = [
        "# Candidates for `standard-v2`",
        "",
        f"`python benchmarks/choose_standard.py`: {len(scores)} candidates, {victims_in(scores)} victims, three seeds.",
        "",
        "| | adversary | best so far, % | gain |",
        "|---|---|---|---|",
        *(f"| {i} | `{n}` | {100 * s:.1f} | {100 * g:.1f} |" for i, (n, s, g) in enumerate(chosen, 1)),
        f"| | all {len(scores)} | {100 * best(whole, list(scores)):.1f} | |",
        "",
        "| cover chosen with | members | on its own seed, % | on the other seeds | all candidates there |",
        "|---|---|---|---|---|",
    ]
    own: list[set[str]] = []
    for seed in SEEDS:
        others = tuple(s for s in SEEDS if s != seed)
        alone, elsewhere = stacked(scores, (seed,)), stacked(scores, others)
        names = [name for name, *_ in cover(alone)]
        own.append(set(names))
        figures = best(alone, names), best(elsewhere, names), best(elsewhere, list(scores))
        lines.append(f"| seed {seed} | {len(names)} | " + " | ".join(f"{100 * f:.1f}" for f in figures) + " |")
    common = Counter(name for names in own for name in names)
    lines += [
        "",
        f"In all three covers: {sum(n == 3 for n in common.values())}; in two: {sum(n == 2 for n in common.values())}; "
        f"in one: {sum(n == 1 for n in common.values())}.",
        "",
        "| battery | best, % |",
        "|---|---|",
        *(
            f"| `{name}` | {100 * best(whole, [a.name for a in listed(name)]):.1f} |"
            for name in ("quick-v1", "quick-v2", "standard-v1")
        ),
        f"| the cover | {100 * best(whole, [name for name, *_ in chosen]):.1f} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "choose"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=Path, help="a finished run of trajectory-erasure/trade-off")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--part", default="1/1", help="such as 1/2: this half of the attacks")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "measure":
        at, of = map(int, given.part.split("/"))
        measure(given.folder, given.models, given.data, (at, of))
        return
    page = choose(given.folder)
    print(page)
    if given.out:
        given.out.write_text(page)


if __name__ == "__main__":
    main()
