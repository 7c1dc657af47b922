"""For which victims each move is part of the best attack, from the attacks of `choose_standard.py`.

    python benchmarks/moves.py FOLDER [--out PAGE.md]

FOLDER has the rows of its rounds `base` and `rest`. A move is an undo move, a start, a scope, a kind of gradient, a
schedule, an option, or an adversary that does not fine-tune. Scores are means over seeds of the best so far, of attacks
made with every seed. The lead of a move on a victim is what the best attack with it has over the best one without it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from choose_standard import SEEDS, WIDTH, Measured, candidates

from holdfast.adversaries import UNDO, Adversary, DirectionalAblation, FineTuning, Probe, Unlabelled
from holdfast.adversaries.finetuning import OPTIONS

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


@dataclass(frozen=True)
class Lead:
    """The best attack with a move, against the best without it.

    Attributes:
        victim: attacked with every candidate.
        points: of the test score, after the last step; 0 if an attack without the move is as good.
        early: the largest at any budget.
        once: after the last step with the first seed alone, with which every candidate was tried.
    """

    victim: str
    points: float
    early: float
    once: float


def leads(found: Measured) -> dict[str, list[Lead]]:
    """By move, its lead on every victim that was attacked with all candidates."""
    of = {adversary.name: moves(adversary) for adversary in candidates()}
    every = {f"undo {name}" for name in UNDO} | {move for names in of.values() for move in names}
    table: dict[str, list[Lead]] = {move: [] for move in sorted(every)}
    for victim in sorted(found.open_victims()):
        tried = set.intersection(*(found.names(victim, seed) for seed in SEEDS)) & set(of)
        means = {name: _mean(found, victim, name, SEEDS) for name in tried}
        once = {name: _mean(found, victim, name, SEEDS[:1]) for name in of}
        for move, each in table.items():
            points = _over(means, {name for name in tried if move in of[name]})
            first = _over(once, {name for name in of if move in of[name]})
            each.append(Lead(victim, points[-1], max(points), first[-1]))
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


def page(found: Measured) -> str:
    """The page."""
    table = leads(found)
    victims = next(iter(table.values()))
    shams = sum(lead.victim.startswith("sham: ") for lead in victims)
    lines, early, once, nowhere = [], [], [], []
    for move, each in sorted(table.items(), key=lambda pair: -max(lead.points for lead in pair[1])):
        first = sorted((lead for lead in each if lead.points >= 0), key=lambda lead: -lead.points)
        if first:
            alone = sum(lead.points > 0 for lead in first)
            shown = ", ".join(f"{_short(lead.victim)} ({lead.points:.1f})" for lead in first[:SHOWN])
            lines.append(f"| {move} | {len(first)} | {alone} | {shown}{' ...' if len(first) > SHOWN else ''} |")
        elif (most := max(each, key=lambda lead: lead.early)).early >= 0:
            early.append(f"{move} (by {most.early:.1f} on {_short(most.victim)})")
        elif (nearest := max(each, key=lambda lead: lead.once)).once >= 0:
            once.append(f"{move} (by {nearest.once:.1f} on {_short(nearest.victim)})")
        else:
            nowhere.append(f"{move} ({-nearest.once:.1f} on {_short(nearest.victim)})")
    rows = "\n".join(lines)
    return f"""# For which victims a move is part of the best attack

{len(victims)} victims, {shams} of them sham defenses as their answers meet them, the others originals, a fresh network
and defended models. All {len(candidates())} candidates of [the choice of `standard-v2`](standard-v2.md) attacked each
of them with one seed; what reached a goal or was among the best was repeated with two more, and is compared here.
*Best for*: victims on which the best attack with the move is at least as good as the best one without it, after the
last step, mean over three seeds. *Alone*: it is better. In brackets, by how many points.

| move | best for | alone | victims |
|---|---|---|---|
{rows}

Best at an earlier step alone: {"; ".join(early) or "none"}.

Best with the first seed alone, after the last step: {"; ".join(once) or "none"}.

Best nowhere, with the points that are missing with the first seed on the nearest victim:
{"; ".join(nowhere) or "none"}.

Made by `benchmarks/moves.py`.
"""


def _short(victim: str) -> str:
    return victim.removeprefix("sham: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    text = page(Measured(given.folder))
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
