"""For which victims each move is part of the best attack.

    python benchmarks/moves.py FOLDER [--runs RUN ... --data DIR] [--part 1/2]
    python benchmarks/moves.py FOLDER --out PAGE.md

FOLDER has the rows of `choose_standard.py`. The first command attacks the victims of its round `rest` with every
candidate and three seeds, and shams that had no part in the choice with their answers as well; what is there already
is not run again. `--part` is a share of the victims. The second writes the page.

A move is an undo move, a start, a scope, a kind of gradient, a schedule, an option, or an adversary that does not
fine-tune. Scores are means over seeds of the best so far. The lead of a move on a victim is what the best attack with
it has over the best one without it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from choose_standard import RECOVERED, SEEDS, WIDTH, Measured, attacked, candidates
from victims import BASE, Victim, held_out, unique, victims, zoo

from holdfast.adversaries import UNDO, Adversary, DirectionalAblation, FineTuning, Probe, Unlabelled, listed
from holdfast.adversaries.finetuning import OPTIONS

LATER = "held out: "
"""What names of shams begin with that were made after the choice."""
ORIGINAL = "original of later ones: "
"""What names of their originals begin with."""
SHOWN = 4
"""Victims of a move that the page names."""


def moves(adversary: Adversary) -> set[str]:
    """What an adversary does beside usual fine-tuning."""
    if isinstance(adversary, Probe):
        return {f"probe, {adversary.solver}"}
    found = {DirectionalAblation: {"directional ablation"}, Unlabelled: {"few labels"}}.get(type(adversary), set())
    if isinstance(adversary, FineTuning):
        found |= {f"undo {name}" for name in adversary.undo}
        found |= {name for name in OPTIONS[1:] if getattr(adversary, name)}
    strategy = adversary.strategy
    found |= {f"start {strategy.initialisation}", f"scope {strategy.scope}"}
    found |= {f"gradient {strategy.gradient}"} if strategy.gradient != "raw" else set()
    found |= {f"schedule {strategy.schedule}"} if strategy.schedule != "constant" else set()
    return found | ({"sharpness"} if strategy.sharpness else set())


def everything() -> tuple[Adversary, ...]:
    """Every candidate of the choice, and the answers of shams that were made later."""
    later = (row.answer for row in zoo.ZOO.values() if row.domain == "vision" and row.held_out)
    return unique((*candidates(), *later))


def measure(folder: Path, runs: list[Path], data: Path | None, part: tuple[int, int]) -> None:
    """Attacks every victim with every adversary and seed, where that has not been done."""
    chosen_with = Measured(folder)
    asked = chosen_with.open_victims()
    jobs = [victim for victim in victims(runs, data) if victim.name in asked]
    jobs = [*jobs, *held_out()][part[0] - 1 :: part[1]]
    own = folder / "moves"
    own.mkdir(exist_ok=True)
    for victim in jobs:
        _measure(victim, chosen_with, own, part[0])


def _measure(victim: Victim, chosen_with: Measured, own: Path, number: int) -> None:
    known = {*chosen_with.scores, *Measured(own).scores}
    for seed in SEEDS:
        wanted = everything() if victim.name.startswith(LATER) else candidates()
        wanted = BASE if victim.name.startswith(ORIGINAL) else wanted
        left = [a for a in wanted if (victim.name, a.name, seed) not in known]
        rows = [{**row, "like": victim.like} for row in attacked(left, victim, seed)]
        with (own / f"{number}.jsonl").open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    print(victim.name, flush=True)


@dataclass(frozen=True)
class Lead:
    """The best attack with a move, against the best without it.

    Attributes:
        victim: attacked with every adversary.
        points: of the test score, after the last step; 0 if an attack without the move is as good.
        early: the largest at any budget.
    """

    victim: str
    points: float
    early: float


def leads(found: Measured, names: list[str]) -> dict[str, list[Lead]]:
    """By move, its lead on each of these victims."""
    of = {adversary.name: moves(adversary) for adversary in everything()}
    every = {f"undo {name}" for name in UNDO} | {move for own in of.values() for move in own}
    table: dict[str, list[Lead]] = {move: [] for move in sorted(every)}
    for victim in names:
        tried = set.intersection(*(found.names(victim, seed) for seed in SEEDS)) & set(of)
        means = {name: _mean(found, victim, name, SEEDS) for name in tried}
        for move, each in table.items():
            points = _over(means, {name for name in tried if move in of[name]})
            each.append(Lead(victim, points[-1], max(points)))
    return table


def _mean(found: Measured, victim: str, name: str, seeds: tuple[int, ...]) -> list[float]:
    """At each budget, in points."""
    each = [found.scores[victim, name, seed] for seed in seeds]
    return [100 * sum(column) / len(seeds) for column in zip(*each, strict=True)]


def _over(means: dict[str, list[float]], some: set[str]) -> list[float]:
    """What the best of some has over the best of the others, at each budget."""
    parts = [[means[name] for name in means if (name in some) == inside] for inside in (True, False)]
    with_it, without = ([max(column) for column in zip(*part, strict=True)] or [0.0] * WIDTH for part in parts)
    return [a - b for a, b in zip(with_it, without, strict=True)]


def short_of(found: Measured, battery: str) -> list[str]:
    """Later shams of which a battery does not recover `RECOVERED` of what `quick-v2` loses by them, as released."""
    members, base = ([attack.name for attack in adversaries] for adversaries in (listed(battery), BASE))
    short = []
    for victim in (name for name in found.like if name.startswith(LATER)):
        original = ORIGINAL + zoo.ZOO[victim.removeprefix(LATER)].setting
        whole, plain, reached = (
            sum(found.best(who, names, seed)[-1] for seed in SEEDS) / len(SEEDS)
            for who, names in ((original, base), (victim, base), (victim, members))
        )
        if reached < plain + RECOVERED * (whole - plain):
            short.append(victim.removeprefix(LATER))
    return short


def page(folder: Path) -> str:
    """The page."""
    found = Measured(folder)
    names = sorted(found.open_victims())
    found.add(Measured(folder / "moves").rows)
    names += sorted(victim for victim in found.like if victim.startswith(LATER))
    table = leads(found, names)
    shams, later = (sum(name.startswith(kind) for name in names) for kind in ("sham: ", LATER))
    lines, early, nowhere = [], [], []
    for move, each in sorted(table.items(), key=lambda pair: -max(lead.points for lead in pair[1])):
        first = sorted((lead for lead in each if lead.points >= 0), key=lambda lead: -lead.points)
        if first:
            alone = sum(lead.points > 0 for lead in first)
            shown = ", ".join(f"{_short(lead.victim)} ({lead.points:.1f})" for lead in first[:SHOWN])
            lines.append(f"| {move} | {len(first)} | {alone} | {shown}{' ...' if len(first) > SHOWN else ''} |")
        elif (most := max(each, key=lambda lead: lead.early)).early >= 0:
            early.append(f"{move} (by {most.early:.1f} on {_short(most.victim)})")
        else:
            nearest = max(each, key=lambda lead: lead.early)
            nowhere.append(f"{move} ({-nearest.early:.1f} on {_short(nearest.victim)})")
    rows = "\n".join(lines)
    batteries = {name: short_of(found, name) for name in ("standard-v1", "standard-v2")}
    missed = "; ".join(f"`{name}` on {later - len(short)}" for name, short in batteries.items())
    return f"""# For which victims a move is part of the best attack

{len(names)} victims: {shams} sham defenses that `quick-v2` leaves short, {later} sham defenses that were made after
[the choice of `standard-v2`](standard-v2.md), and originals, a fresh network and defended models. Shams are attacked
as their answers meet them. Each of the {len(candidates())} candidates of that choice attacked each victim with
{len(SEEDS)} seeds; on the later shams their answers count as well, {len(everything())} attacks in all.
*Best for*: victims on which the best attack with the move is at least as good as the best one without it, after the
last step, mean over the seeds. *Alone*: it is better. In brackets, by how many points.

| move | best for | alone | victims |
|---|---|---|---|
{rows}

Best at an earlier step alone: {"; ".join(early) or "none"}.

Best nowhere, with the points that are missing on the nearest victim: {"; ".join(nowhere) or "none"}.

An audit also attacks a model's weights inside the original's code, where they fit, which undoes most of the {later}
later shams at once. **Attacked in the code that they are released with**, a battery recovers {RECOVERED:.0%} of what
`quick-v2` loses by them (means over the seeds, after the last step): {missed}. `standard-v2` does not on:
{", ".join(batteries["standard-v2"]) or "none"}.

Made by `benchmarks/moves.py`.
"""


def _short(victim: str) -> str:
    return victim.removeprefix("sham: ").removeprefix(LATER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="finished runs of trajectory-erasure/mnist")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not given.out:
        torch.set_num_threads(1)
        at, of = map(int, given.part.split("/"))
        measure(given.folder, given.runs, given.data, (at, of))
        return
    given.out.write_text(page(given.folder))


if __name__ == "__main__":
    main()
