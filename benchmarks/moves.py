"""Measures which attack is the best on each victim: on every sham defense of vision, and on what they are made from.

    python benchmarks/moves.py ROWS.jsonl [--seeds 2] [--only VICTIM ...] [--out PAGE.md]

Each move and setting alone is an attack, besides the usual one: nothing else changes. A victim is a line of ROWS.jsonl,
and one that is there is not measured again. The page says for which victims an attack is the best, and which attacks
are the best nowhere. Attacks are on the victim as released, not inside the original's code.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from holdfast.adversaries import UNDO, Adversary, DirectionalAblation, FineTuning, Probe, Unlabelled, listed
from holdfast.training import Strategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zoo import SETTINGS, ZOO, case  # the zoo belongs to the tests
from zoo.measure import best
from zoo.settings import ADAM

SHOWN = 6
"""Victims of an attack that the page names."""


def usual(**change: Any) -> Strategy:
    """The usual strategy with one change."""
    return Strategy(**{**ADAM.settings(), **change})


def attacks() -> dict[str, Adversary]:
    """Every attack by what it changes."""
    starts = ("direct", "last-block", "last-half", "shrink-perturb")
    scopes = ("head", "last-block", "norm", "lora")
    gradients = ("normalised", "sign", "layerwise", "orthogonal")
    options: dict[str, Any] = {
        "burn_in": 3, "replay": 1.0, "anchor": 1.0, "benign_first": 5, "benign_floor": 0.8, "distil_first": 10,
        "augment": "rand-m5-n1",
    }  # fmt: skip
    return {
        "usual": FineTuning(ADAM),
        **{adversary.name: adversary for adversary in listed("quick-v1") if adversary.name != FineTuning(ADAM).name},
        **{f"undo {name}": FineTuning(ADAM, undo=(name,)) for name in UNDO},
        **{f"start {name}": FineTuning(usual(initialisation=name)) for name in starts},
        **{f"scope {name}": FineTuning(usual(scope=name, learning_rate=1e-2)) for name in scopes},
        **{
            f"gradient {name}": FineTuning(usual(optimizer="sgd", learning_rate=5e-2, gradient=name))
            for name in gradients
        },
        **{name: FineTuning(ADAM, **{name: value}) for name, value in options.items()},
        "anchor, low rate": FineTuning(usual(initialisation="direct", learning_rate=3e-5), anchor=1.0),
        "sharpness": FineTuning(usual(sharpness=0.05)),
        "cosine": FineTuning(usual(learning_rate=4e-3, schedule="cosine", schedule_steps=20, warmup=2)),
        "restarts": FineTuning(usual(learning_rate=4e-3, schedule="restarts", schedule_steps=10)),
        "negate-head, direct": FineTuning(usual(initialisation="direct", learning_rate=1e-4), undo=("negate-head",)),
        "probe newton": Probe("newton"),
        "probe ridge": Probe("ridge", "whitened"),
        "probe adam": Probe("adam", "standardised", 1e-1),
        "ablation": DirectionalAblation(ADAM, depth=1.0),
        "unlabelled": Unlabelled(ADAM, share=0.5),
    }


def victims() -> list[str]:
    """Names of the shams of vision, and of their originals."""
    settings = [f"original: {name}" for name, setting in SETTINGS.items() if setting.domain == "vision"]
    return [*settings, *(name for name, sham in ZOO.items() if sham.domain == "vision")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    done = {found["victim"]: found["scores"] for found in map(json.loads, lines)}
    for victim in options.only or victims():
        if victim not in done:
            done[victim] = scores(victim, options.seeds)
            with options.rows.open("a") as file:
                file.write(json.dumps({"victim": victim, "seeds": options.seeds, "scores": done[victim]}) + "\n")
            print(victim, *sorted(done[victim].items(), key=lambda each: -each[1])[:3], flush=True)
    text = page(done, options.seeds)
    print(text)
    if options.out:
        options.out.write_text(text)


def scores(victim: str, seeds: int) -> dict[str, float]:
    """The best score of each attack that can be made on a victim."""
    if victim in ZOO:
        built = case(victim)
        model, setting = built.model, built.setting
    else:
        setting = SETTINGS[victim.removeprefix("original: ")]
        model = setting.original
    fit = {n: a for n, a in attacks().items() if a.not_applicable(model, setting.restricted) is None}
    return {name: best([attack], model, setting, seeds).score for name, attack in fit.items()}


def page(done: dict[str, dict[str, float]], seeds: int) -> str:
    """The page."""
    first: dict[str, list[str]] = {name: [] for name in attacks()}
    for victim, found in done.items():
        highest = max(found.values())
        winners = [name for name, score in found.items() if score == highest]
        for name in winners:
            first[name].append(victim if len(winners) == 1 else f"{victim} (with others)")
    rows = [
        f"| {name} | {len(best_for)} | {', '.join(best_for[:SHOWN])}{' ...' if len(best_for) > SHOWN else ''} |"
        for name, best_for in sorted(first.items(), key=lambda each: -len(each[1]))
        if best_for
    ]
    nowhere = ", ".join(name for name, best_for in first.items() if not best_for)
    lines = "\n".join(rows)
    return f"""# Which attack is the best, and where

{len(done)} victims: sham defenses of vision, as released, and what they are made from. Each attack changes one thing of
the usual one, a fresh head and Adam at 1e-3; best score at any budget, mean over {seeds} seeds. Where several attacks
reach the same score, each counts, *with others*.

| attack | best for | victims |
|---|---|---|
{lines}

Best nowhere: {nowhere or "none"}.

Made by `benchmarks/moves.py`.
"""


if __name__ == "__main__":
    main()
