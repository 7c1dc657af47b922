"""What a protocol's curves say, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from holdfast.comparison import Comparison
from holdfast.immunizing import Made
from holdfast.results import Cell
from holdfast.scenes import ORIGINAL, SCRATCH, Row, Scene, ahead_of_scratch, first_lost, largest_jump, mean_of, role_of

BELOW_CHANCE = 0.03
"""By how much a score must be under chance, and under the original's, before the findings wonder at it."""


def findings_of(
    scene: Scene, rows: Sequence[Row], compared: Mapping[str, Comparison], epochs: Sequence[int]
) -> list[str]:
    """Returns what is to be said of one setting.

    Args:
        scene: the setting.
        rows: its rows.
        compared: each model beside scratch and the original; see `compare`.
        epochs: of the protocol.
    """
    labels = list(dict.fromkeys(label for label, _ in scene.made))
    found = [_about_original(scene, compared, epochs)] if SCRATCH in compared and ORIGINAL in compared else []
    for label in labels:
        if label in compared:
            found.append(_about_defense(label, scene, rows, compared, epochs))
        found += _about_immunization(label, scene.made)
    refused = {row.attack: row.remark for row in rows if row.remark}
    found += [f"{attack} is {remark}." for attack, remark in refused.items()]
    return found


def _about_original(scene: Scene, compared: Mapping[str, Comparison], epochs: Sequence[int]) -> str:
    """What there is to protect."""
    ahead = ahead_of_scratch(ORIGINAL, compared[ORIGINAL])
    assert ahead is not None
    last = Cell.of(seed[-1] for seed in ahead)
    text = (
        f"After epoch {epochs[-1]}, the best attack on the original is at {_score(compared, ORIGINAL)}, "
        f"from scratch at {_score(compared, SCRATCH)}; chance is {_percent(scene.chance)}."
    )
    if last.mean is not None and last.mean <= 0:
        text += " The original is worth nothing to the adversary there, so that there is nothing to protect."
    return text


def _about_defense(
    label: str, scene: Scene, rows: Sequence[Row], compared: Mapping[str, Comparison], epochs: Sequence[int]
) -> str:
    comparison = compared[label]
    best = comparison.batteries["immunized"].best_name(len(epochs) - 1)
    text = f"After epoch {epochs[-1]}, {label} under its best attack, {best}, is at {_score(compared, label)}"
    ahead = ahead_of_scratch(label, comparison)
    if ahead is not None:
        last, area = Cell.of(seed[-1] for seed in ahead), Cell.of(mean_of(seed[1:]) for seed in ahead)
        text += f": {_points(last)} over scratch, and {_points(area)} on average over epochs"
        pairs = [(r, s) for r in rows for s in rows if r.model == label and s.model == SCRATCH and r.attack in s.covers]
        ends = [(r.cell(epochs[-1]).mean, s.cell(epochs[-1]).mean) for r, s in pairs if r.curves and s.curves]
        below = sum(own is not None and scratch is not None and own <= scratch for own, scratch in ends)
        text += f"; {below} of {len(ends)} attacks end no higher than the same from scratch"
    low = _below_chance(label, rows, epochs[-1], scene.chance)
    if low:
        text += (
            f". Below chance ({_percent(scene.chance)}) after {', '.join(low)}: the model avoids the right answers, "
            "which is not the same as not knowing them"
        )
    benign = scene.benign(label)
    if benign.mean is not None and scene.original is not None:
        text += f". Benign {scene.unit} was {_percent(scene.original)} before, and is {_percent(benign.mean)}"
    return text + "."


def _below_chance(label: str, rows: Sequence[Row], epoch: int, chance: float) -> list[str]:
    """Attacks that leave the model clearly under chance, where they do not leave the original there as well."""
    ends = {(r.model, r.attack): r.cell(epoch).mean for r in rows if r.curves}
    found = []
    for (model, attack), end in ends.items():
        known = [v for v in (ends.get((ORIGINAL, attack)),) if v is not None]
        if model == label and end is not None and end < min([chance, *known]) - BELOW_CHANCE:
            found.append(attack)
    return found


def _about_immunization(label: str, every: Mapping[tuple[str, int], Made]) -> list[str]:
    """What went wrong, or was taken from elsewhere."""
    own = {seed: made for (name, seed), made in every.items() if name == label}
    found = []
    lost = {seed: at for seed, made in own.items() if (at := first_lost(made.result)) is not None}
    if lost:
        rounds = ", ".join(map(str, lost.values()))
        found.append(f"{label}: in {len(lost)} of {len(own)} seeds a suppression loss was not finite (round {rounds}).")
    unfinished = [seed for seed, made in own.items() if not made.result.completed]
    if unfinished:
        seeds = ", ".join(map(str, unfinished))
        found.append(f"{label} did not complete with seed {seeds}: it gave up early, and its last state was attacked.")
    jumps = [jump for made in own.values() if (jump := _jump_of(made)) is not None]
    if jumps:
        found.append(f"{label}: the largest jump of its suppression loss between two rounds is {max(jumps):.3g}.")
    for owner in dict.fromkeys(made.reused_from for made in own.values() if made.reused_from):
        found.append(f"{label} was not immunized here, but reused from {owner}.")
    return found


def _jump_of(made: Made) -> float | None:
    return largest_jump(made.result.history.get("suppression_loss", []))


def _score(compared: Mapping[str, Comparison], model: str) -> str:
    value = float(compared[model].scores[role_of(model)][:, -1].mean())
    return _percent(value) if math.isfinite(value) else "no finite score"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _points(cell: Cell) -> str:
    if cell.mean is None:
        return "a number of points that is not finite"
    error = "" if cell.standard_error is None else f" ± {100 * cell.standard_error:.1f}"
    return f"{100 * cell.mean:+.1f}{error} points"
