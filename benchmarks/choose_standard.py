"""How `standard-v2` was chosen: attacks on every victim, and a cover that leaves none of them short.

    python benchmarks/choose_standard.py base FOLDER [--runs RUN ... --data DIR] [--workers 2]
    python benchmarks/choose_standard.py rest FOLDER [--runs RUN ... --data DIR] [--workers 2]
    python benchmarks/choose_standard.py choose FOLDER [--out PAGE.md]

Victims are in `victims.py`. `base` attacks every one of them with `quick-v2`, and shams with their answers and the
attacks that they were made against, with three seeds. `rest` attacks those that `quick-v2` leaves short, and all that
are not shams, with every candidate: members of `standard-v1`, openings and answers of `adaptive-v2`, answers of shams,
and some more. It does so with one seed, and with the two others for what reaches a goal there or is among the best.
Each attack is a JSON line, and what is there already is not run again. Models with the same weights in the same code
count as one in `rest`.

`choose` begins with `quick-v2` and keeps adding the candidate that brings most victims to their goals; among equals the
one that takes most from the sum of what is missing. Of a sham, one member must reach the goal with every seed; only
where no candidate does, one for each seed. Of the others, each seed counts alone. Then it takes out members, of those
it added, without which no goal is lost. Goals:

- of a sham, after its last step: 80 % of what the best plain attack loses by it, against the best of `quick-v2` on the
  original with the same seed; or within 2 points of the best of all candidates, if that is less.
- of the others, at each budget: within 2 points of the best of all candidates.

It does so for three seeds together, which is the battery, and for one or two seeds, scored on those left out.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from victims import BASE, Victim, unique, victims, zoo

from holdfast.adversaries import SEARCHES, Adversary, DirectionalAblation, FineTuning, Probe, Unlabelled, listed
from holdfast.adversaries.batched import Member, attack_together, stacks
from holdfast.runtime.run import Run
from holdfast.training import Strategy

RECOVERED = 0.8
"""Share of what a sham takes from plain attacks that the battery recovers."""
WITHIN = 0.02
"""How far below the best of all candidates the battery may stay elsewhere."""
SEEDS = (0, 1, 2)
PUBLISHED = ("quick-v1", "quick-v2", "standard-v1", "standard-v2")
WIDTH = 3
"""Budgets of a victim, without 0; one with fewer counts its last one more than once."""
REPEATED = 15
"""Of the candidates that reach no goal of a victim with the first seed, so many are made with the others as well."""
EXACT = 1e-6
"""What counts as missing."""
Row = dict[str, Any]


def candidates() -> tuple[Adversary, ...]:
    """Every adversary that may become a member."""
    search = SEARCHES["adaptive-v2"]
    points = [*search.openings, *(point for answers in search.answers.values() for point in answers)]
    head = Strategy("head", "all", "adam", 1e-3, 50)
    return unique(
        (
            *BASE,
            *listed("standard-v1"),
            *(search.make({**search.default, **point}) for point in points),
            *(row.answer for row in zoo.ZOO.values() if row.domain == "vision" and not row.held_out),
            FineTuning(Strategy("head", "all", "adam", 1e-3, 50, schedule="cosine", schedule_steps=50, warmup=5)),
            FineTuning(Strategy("head", "all", "adam", 4e-3, 50, schedule="restarts", schedule_steps=10)),
            FineTuning(Strategy("direct", "all", "adam", 1e-4, 50)),
            FineTuning(Strategy("shrink-perturb", "all", "adam", 1e-2, 50)),
            FineTuning(Strategy("head", "all", "sgd", 1e-2, 50, gradient="sign")),
            FineTuning(head, burn_in=3),
            FineTuning(head, replay=0.5),
            FineTuning(head, benign_floor=0.9),
            FineTuning(head, undo=("insert",)),
            FineTuning(head, undo=("round-int8",)),
            FineTuning(head, undo=("mirror-inputs",)),
            FineTuning(head, undo=("grey-inputs",)),
            FineTuning(head, undo=("renormalise-inputs",)),
            FineTuning(head, undo=("renew-quarter-4",)),
            Unlabelled(head, share=0.5),
            DirectionalAblation(head),
            Probe("newton", "raw"),
        )
    )


def measure(what: str, folder: Path, everything: Iterable[Victim], workers: int) -> None:
    """Attacks victims, in several processes; `what` is the round."""
    folder.mkdir(parents=True, exist_ok=True)
    found, jobs = Measured(folder), [*everything]
    if what == "rest":
        open_ones = found.open_victims()
        jobs = [victim for victim in jobs if victim.name in open_ones]
    context = multiprocessing.get_context("fork")  # victims are built once
    parts = [jobs[at::workers] for at in range(workers)]
    started = [
        context.Process(target=_measure, args=(what, folder / f"{what}-{at}.jsonl", part, found))
        for at, part in enumerate(parts)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise SystemExit("A process failed; the same command goes on where it stopped.")


def _measure(what: str, file: Path, jobs: list[Victim], found: Measured) -> None:
    for victim in jobs:
        for seed in SEEDS:
            wanted = victim.first
            if what == "rest":
                wanted = candidates() if seed == SEEDS[0] else found.promising(victim)
            left = [a for a in wanted if (victim.name, a.name, seed) not in found.scores]
            new = [{**row, "like": victim.like} for row in attacked(left, victim, seed)]
            with file.open("a") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in new)
            found.add(new)


def attacked(adversaries: list[Adversary], victim: Victim, seed: int) -> list[Row]:
    """The scores of attacks; of one that does not apply or does not work, the reason. Equal ones train together."""
    run = Run(seed=0, device=torch.device("cpu"))
    few = victim.restricted.few_shot(victim.shots, seed)
    found: dict[str, Row] = {}
    members = []
    for adversary in adversaries:
        reason = adversary.not_applicable(victim.model, few)
        if reason is None:
            members.append(Member(adversary, victim.model, few, "immunized", seed, repaired=True))
        else:
            found[adversary.name] = {"reason": reason}
    for group in stacks(members):
        begin = time.process_time()
        try:
            if len(group) == 1:
                curves = [group[0].adversary.attack(
                    victim.model, few, budgets=victim.budgets, run=run, seed=seed, benign=victim.benign
                )]  # fmt: skip
            else:
                curves = attack_together(group, budgets=victim.budgets, run=run)
        except Exception as error:  # a sham's code may raise anything
            found |= {member.adversary.name: {"reason": repr(error)[:200]} for member in group}
            continue
        seconds = (time.process_time() - begin) / len(group)
        for member, curve in zip(group, curves, strict=True):
            found[member.adversary.name] = {"scores": curve.scores[1:], "seconds": round(seconds, 3)}
    return [{"victim": victim.name, "name": name, "seed": seed, **row} for name, row in found.items()]


class Measured:
    """The rows of a folder, as scores by victim, adversary and seed: the best so far at each budget."""

    def __init__(self, folder: Path) -> None:
        self.rows: list[Row] = []
        self.scores: dict[tuple[str, str, int], list[float]] = {}
        self.like: dict[str, str | None] = {}
        """By victim, what is equal for those with the same weights in the same code."""
        for path in sorted(folder.glob("*.jsonl")):
            self.add(json.loads(line) for line in path.read_text().splitlines())

    def add(self, rows: Iterable[Row]) -> None:
        """Adds attacks."""
        for row in rows:
            self.rows.append(row)
            self.scores[row["victim"], row["name"], row["seed"]] = best_so_far(row.get("scores"))
            self.like[row["victim"]] = row["like"]

    @property
    def stands_for(self) -> dict[str, str]:
        """By victim, the first one with the same weights in the same code."""
        first: dict[str, str] = {}
        return {victim: first.setdefault(like, victim) if like else victim for victim, like in self.like.items()}

    def names(self, victim: str, seed: int) -> set[str]:
        """What attacked a victim."""
        return {name for who, name, which in self.scores if (who, which) == (victim, seed)}

    @property
    def shams(self) -> list[str]:
        """Their names among the victims."""
        return [victim for victim in self.like if victim.startswith("sham: ")]

    @property
    def others(self) -> list[str]:
        """Originals, the fresh network and defended models, each once."""
        kinds = ("original: ", "control: ", "real: ")
        return [v for v, same in self.stands_for.items() if v.startswith(kinds) and same == v]

    def best(self, victim: str, names: Iterable[str], seed: int) -> list[float]:
        """The best of some adversaries at each budget, of those that were tried."""
        tried = [self.scores[victim, name, seed] for name in names if (victim, name, seed) in self.scores]
        return [max(column) for column in zip(*tried, strict=True)] if tried else []

    def goal(self, sham: str, seed: int) -> float:
        """What is to be reached after the last step, wherever it can be."""
        row = zoo.ZOO[sham.removeprefix("sham: ")]
        released = sham.replace("sham: ", "released: ") if row.inside else sham
        plain = self.best(released, [attack.name for attack in row.plain], seed)[-1]
        of = next(v for v in self.like if v in (f"original: {row.setting}", f"looks: {row.setting}"))
        original = self.best(of, [attack.name for attack in BASE], seed)[-1]
        return plain + RECOVERED * max(original - plain, 0.0)

    def goals(self, victim: str, seed: int) -> list[float]:
        """At each budget; minus infinity where nothing is asked."""
        most = [score - WITHIN for score in self.best(victim, [adversary.name for adversary in candidates()], seed)]
        if victim in self.others:
            return most
        asked = max(self.goal(sham, seed) for sham in self.shams if self.stands_for[sham] == victim)
        return [-math.inf] * (WIDTH - 1) + [min(asked, most[-1])]

    def promising(self, victim: Victim) -> list[Adversary]:
        """Candidates that reach a goal with the first seed, and the best of the others."""
        seed, goals = SEEDS[0], self.goals(victim.name, SEEDS[0])
        reached = {a.name: self.scores[victim.name, a.name, seed] for a in candidates()}
        first = sorted(reached, key=lambda name: -reached[name][-1])[:REPEATED]
        return [
            a
            for a in candidates()
            if a.name in first or any(s >= g > -math.inf for s, g in zip(reached[a.name], goals, strict=True))
        ]

    def open_victims(self) -> set[str]:
        """Shams that the base leaves short with a seed, and all others; one for those that are alike."""
        return {self.stands_for[victim] for victim in self.short} | set(self.others)

    @property
    def short(self) -> set[str]:
        """Shams that the base leaves short with a seed."""
        base = [attack.name for attack in BASE]
        return {v for v in self.shams if any(self.best(v, base, s)[-1] < self.goal(v, s) for s in SEEDS)}


def best_so_far(scores: list[float | None] | None) -> list[float]:
    """The best score up to each budget, as an adversary may stop early; zeros for one that does not apply."""
    known = [score or 0.0 for score in scores or []]
    known += [0.0] * (WIDTH - len(known))
    return [max(known[: i + 1]) for i in range(WIDTH)]


@dataclass(frozen=True)
class Cells:
    """What is to be reached, and what each candidate reaches: a cell is a victim with one seed.

    Attributes:
        names: victim and seed of each cell.
        goals: shape (cells, budgets); minus infinity where nothing is asked.
        scores: by candidate, of the same shape.
    """

    names: list[tuple[str, int]]
    goals: torch.Tensor
    scores: dict[str, torch.Tensor]

    def missing(self, members: Iterable[str]) -> torch.Tensor:
        """By cell, how far the best of some adversaries stays below the goals, summed over budgets."""
        best = torch.stack([self.scores[name] for name in members if name in self.scores]).amax(0)
        return (self.goals - best).clamp(min=0).sum(1)

    def reached(self, members: Iterable[str]) -> torch.Tensor:
        """By cell, whether no goal is missed."""
        return self.missing(members) < EXACT

    def of(self, seeds: Iterable[int]) -> Cells:
        """Those with some seeds alone."""
        asked = {*seeds}
        kept = [i for i, (_, seed) in enumerate(self.names) if seed in asked]
        scores = {name: each[kept] for name, each in self.scores.items()}
        return Cells([self.names[i] for i in kept], self.goals[kept], scores)

    def together(self) -> Cells:
        """What a cover is for: a sham is one cell, which a member reaches if it does so with every seed.

        Where no candidate does, its seeds stay apart, as do those of the others.
        """
        margins = {name: (each - self.goals).nan_to_num(posinf=0.0) for name, each in self.scores.items()}
        rows: dict[tuple[str, int], list[int]] = {}
        for victim in dict.fromkeys(victim for victim, _ in self.names):
            own = [i for i, (who, _) in enumerate(self.names) if who == victim]
            alone = any(float(each[own].amin()) > -EXACT for each in margins.values())
            if victim.startswith("sham: ") and alone:
                rows[victim, -1] = own
            else:
                rows |= {self.names[i]: [i] for i in own}
        merged = {name: torch.stack([each[own].amin(0) for own in rows.values()]) for name, each in margins.items()}
        return Cells([*rows], torch.zeros(len(rows), WIDTH), merged)

    def kind(self, sham: bool) -> Cells:
        """Shams alone, or the others."""
        kept = [i for i, (victim, _) in enumerate(self.names) if victim.startswith("sham: ") == sham]
        scores = {name: each[kept] for name, each in self.scores.items()}
        return Cells([self.names[i] for i in kept], self.goals[kept], scores)


def cells(found: Measured) -> Cells:
    """The goals of every victim that was attacked with all candidates; what was not repeated with a seed has 0."""
    everything = [adversary.name for adversary in candidates()]
    names = [(victim, seed) for victim in sorted(found.open_victims()) for seed in SEEDS]
    for victim, seed in names:
        lacking = set(everything) - found.names(victim, seed)
        if lacking if seed == SEEDS[0] else len(lacking) > len(everything) - REPEATED:
            raise SystemExit(f"{victim} was not attacked with {len(lacking)} candidates, such as {min(lacking)}")
    none = [0.0] * WIDTH
    scores = {
        name: torch.tensor([found.scores.get((victim, name, seed), none) for victim, seed in names])
        for name in everything
    }
    return Cells(names, torch.tensor([found.goals(*name) for name in names]), scores)


def cover(some: Cells) -> list[str]:
    """Names that are added to the base, in the order in which they were chosen."""
    wanted, base, chosen = some.together(), [attack.name for attack in BASE], list[str]()
    while (short := wanted.missing([*base, *chosen])).max() >= EXACT:
        done = int((short < EXACT).sum())

        def gain(name: str, done: int = done) -> tuple[int, float]:
            left = wanted.missing([*base, *chosen, name])
            return int((left < EXACT).sum()) - done, -float(left.sum())

        chosen.append(max(wanted.scores, key=gain))
    for name in chosen[::-1]:  # what later members made needless
        rest = [other for other in chosen if other != name]
        if wanted.missing([*base, *rest]).max() < EXACT:
            chosen = rest
    return chosen


def choose(folder: Path) -> str:
    """The page: the cover, how it depends on the seeds, and other batteries."""
    found = Measured(folder)
    wanted = cells(found)
    chosen = cover(wanted)
    sections = (_opening(found, wanted), _members(wanted, chosen), _stability(wanted), _batteries(wanted, chosen))
    return "\n\n".join(sections) + "\n"


def _opening(found: Measured, wanted: Cells) -> str:
    short = len(found.short)
    capped = sorted({v for v, s in wanted.names if v in found.shams and found.goal(v, s) > found.goals(v, s)[-1]})
    minutes = sum(row.get("seconds", 0) for row in found.rows) / 60
    size = f"{len(wanted.scores)} candidates, {len(SEEDS)} seeds, {len(found.rows)} attacks"
    lower = ", ".join(v.removeprefix("sham: ") for v in capped) or "none"
    return f"""# How `standard-v2` was chosen

`python benchmarks/choose_standard.py`: {size},
{minutes:.0f} minutes of a core.
Victims: {len(found.shams)} shams of images and {len(found.others)} others: originals, a fresh network, defended models.
A goal is, for a sham, {RECOVERED:.0%} of what the best plain attack loses by it, against the best of `quick-v2` on the
original with the same seed; for the others, to be within {100 * WITHIN:.0f} points of the best of all candidates at
each budget. `quick-v2` reaches it with every seed on {len(found.shams) - short} of the shams. The cover is for the
other {short} and for all others.

For these shams the goal is what the best candidate reaches, less {100 * WITHIN:.0f} points, as that is lower with some
seed: {lower}."""


def _members(wanted: Cells, chosen: list[str]) -> str:
    """The cover, and what each member adds."""
    lines = [
        "| | added to `quick-v2` | cells at their goal | first reached with it | only reached with it |",
        "|---|---|---|---|---|",
    ]
    members = [attack.name for attack in BASE]
    lines.append(f"| | `quick-v2` | {int(wanted.reached(members).sum())} of {len(wanted.names)} | | |")
    for i, name in enumerate(chosen, 1):
        before = wanted.reached(members)
        members.append(name)
        now = wanted.reached(members)
        without = wanted.reached([attack.name for attack in BASE] + [other for other in chosen if other != name])
        new, needed = (_victims(wanted, mask) for mask in (now & ~before, ~without))
        lines.append(f"| {i} | `{name}` | {int(now.sum())} | {new} | {needed} |")
    return "\n".join(lines)


def _victims(wanted: Cells, mask: torch.Tensor) -> str:
    """Names of victims, with the number of cells."""
    counts = Counter(victim for (victim, _), there in zip(wanted.names, mask.tolist(), strict=True) if there)
    return ", ".join(f"{v.removeprefix('sham: ')} ({n})" for v, n in counts.items()) or "-"


def _stability(wanted: Cells) -> str:
    """Covers of some seeds, on the others."""
    lines = [
        "| chosen with seeds | added | with seeds | shams at their goal | missing | others at theirs | missing |",
        "|---|---|---|---|---|---|---|",
    ]
    base = [attack.name for attack in BASE]
    own: list[set[str]] = []
    for seeds in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        left = wanted.of(s for s in SEEDS if s not in seeds)
        names = cover(wanted.of(seeds)) if seeds else []
        if len(seeds) == 1:
            own.append(set(names))
        cells_of = " | ".join(_shares(left.kind(sham), [*base, *names]) for sham in (True, False))
        lines.append(
            f"| {_listed(seeds)} | {len(names)} | {_listed(s for s in SEEDS if s not in seeds)} | {cells_of} |"
        )
    common = Counter(name for names in own for name in names)
    counts = {n: sum(c == n for c in common.values()) for n in (3, 2, 1)}
    return "\n".join(lines) + (
        "\n\nA cell is a victim with one seed; *missing* are points on average over cells that miss their goal. An\n"
        "attack that was not repeated with a seed counts as 0 there: these figures are lower than the truth. Of "
        f"the\n{len(common)} candidates that a cover of one seed adds, {counts[3]} are in all three, {counts[2]} in "
        f"two and {counts[1]} in one."
    )


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds)) or "none (`quick-v2`)"


def _shares(some: Cells, names: list[str]) -> str:
    """Cells at their goal, and what is missing in points, on average over the others."""
    short = some.missing(names)
    failed = short[short >= EXACT]
    mean = f"{100 * failed.mean():.1f}" if len(failed) else "-"
    return f"{len(short) - len(failed)} of {len(short)} | {mean}"


def _batteries(wanted: Cells, chosen: list[str]) -> str:
    """Published batteries, and the cover."""
    lines = [
        "| battery | members | shams at their goal | missing | others at theirs | missing |",
        "|---|---|---|---|---|---|",
    ]
    batteries = {f"`{name}`": [a.name for a in listed(name)] for name in PUBLISHED}
    batteries["`quick-v2` and the cover"] = [*(a.name for a in BASE), *chosen]
    batteries["all candidates"] = list(wanted.scores)
    first = wanted.of(SEEDS[:1])
    for name, members in batteries.items():
        shares = " | ".join(_shares(first.kind(sham), members) for sham in (True, False))
        lines.append(f"| {name} | {len(members)} | {shares} |")
    return "Batteries with the first seed, with which every candidate attacked every victim:\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "rest", "choose"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="finished runs of trajectory-erasure/mnist")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what != "choose":
        measure(given.what, given.folder, victims(given.runs, given.data), given.workers)
        return
    page = choose(given.folder)
    print(page)
    if given.out:
        given.out.write_text(page)


if __name__ == "__main__":
    main()
