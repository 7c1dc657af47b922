"""Measures what the zoo claims of each sham defense: that it is as good, looks resistant, and falls to its answer.

    python benchmarks/zoo.py ROWS.jsonl [--seeds 3] [--only NAME ...] [--out PAGE.md]

Each sham is a line of ROWS.jsonl, and one that is there is not measured again: a long run can be continued. The page
shows all lines of the file, in the order of the registry.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from holdfast.adversaries import Adversary, listed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from zoo import SETTINGS, ZOO, case  # the zoo belongs to the tests
from zoo.measure import Best, best, measure

BATTERIES = {"vision": listed("quick-v1"), "language": listed("causal-quick-v1"), "denoising": ()}
"""The quick battery of a domain; denoisers have none, and are measured with the attacks of their setting alone."""
ENOUGH = 0.8
"""Share that an answer should recover."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = read(options.rows)
    for name in options.only or ZOO:
        if name not in done:
            done[name] = measured(name, options.seeds)
            with options.rows.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            print(row(done[name]), flush=True)
    text = page([done[name] for name in ZOO if name in done])
    print(text)
    if options.out:
        options.out.write_text(text)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows that were measured before, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {found["name"]: found for found in map(json.loads, lines)}


@cache
def on_original(setting: str, attacks: tuple[Adversary, ...], seeds: int) -> Best:
    return best(attacks, SETTINGS[setting].original, SETTINGS[setting], seeds)


def measured(name: str, seeds: int) -> dict[str, Any]:
    """One sham: scores as shares, for tasks that are not classes the skill."""
    sham, built = ZOO[name], case(name)
    found = measure(built, on_original(sham.setting, sham.plain, seeds), seeds, sham.plain)
    battery = BATTERIES[sham.domain]
    quick = found.plain
    if sham.plain != battery:
        quick = (on_original(sham.setting, battery, seeds), best(battery, built.model, built.setting, seeds))
    return {
        "name": name,
        "seeds": seeds,
        "benign": found.benign,
        "plain": [each.score for each in found.plain],
        "strongest": found.plain[1].name,
        "quick": [each.score for each in quick] if battery else None,
        "answer": f"{found.answer.name}, in the original's code" if sham.inside else found.answer.name,
        "answered": found.answer.score,
        "share": found.share,
    }


def row(found: dict[str, Any]) -> str:
    """One line of the table."""
    sham = ZOO[found["name"]]
    quick = "-" if found["quick"] is None else _pair(found["quick"])
    cells = (
        found["name"], SETTINGS[sham.setting].shown, sham.mechanism, _pair(found["benign"]), _pair(found["plain"]),
        quick, f"`{found['answer']}`", f"{100 * found['answered']:.0f}", f"{found['share']:.0%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _pair(values: list[float]) -> str:
    return " / ".join(f"{100 * value:.0f}" for value in values)


def page(rows: list[dict[str, Any]]) -> str:
    """The page."""
    counts = ", ".join(f"{sum(ZOO[r['name']].domain == domain for r in rows)} of {domain}" for domain in BATTERIES)
    short = [r["name"] for r in rows if not r["share"] >= ENOUGH]
    worse = [r["name"] for r in rows if r["benign"][1] < r["benign"][0] - 0.03]
    held = sum(r["quick"] is not None and r["quick"][1] < r["quick"][0] - 0.1 for r in rows)
    seeds = ", ".join(map(str, sorted({r["seeds"] for r in rows})))
    lines = "\n".join(map(row, rows))
    return f"""# The zoo of shams

{len(rows)} sham defenses: {counts}. Each keeps the benign score of its original, looks resistant to attacks
that know nothing of it, and falls to the adversary that answers its mechanism. Scores are in %, those of denoisers and
language models are the skill; means over {seeds} seeds, the best at any budget. Two numbers are those of the original
and of the sham.

- *plain*: the best of the attacks that the sham was made against.
- *quick*: the best of `quick-v1`, for language models of `causal-quick-v1`, in which the head alone, a fresh head or an
  anchor may already be the answer. {held} shams take more than 10 points from it.
- *recovered*: what the answer regains of the points that plain attacks lose; above 100 % where it is better than plain
  attacks on the original.

Below {ENOUGH:.0%} recovered: {", ".join(short) or "none"}. Over 3 points of the benign score lost:
{", ".join(worse) or "none"}.

| sham | original | mechanism | benign | plain | quick | answer | its score | recovered |
|---|---|---|---|---|---|---|---|---|
{lines}

Made by `benchmarks/zoo.py`; the shams are in `tests/zoo`.
"""


if __name__ == "__main__":
    main()
