"""Tables, figures and findings of a linear study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from holdfast.experiments.linear.measures import CONVERGENCE, HELD_OUT, MAIN, PUBLISHED, Pairs
from holdfast.experiments.linear.specs import IDENTITY, StudySpec, StudyTable
from holdfast.experiments.setting_scores import mean_of
from holdfast.results.tables import Cell, Figure, Lines, Map, Table
from holdfast.spectral.condition_numbers import PUBLISHED_FLOOR


def study_tables(
    name: str, table: StudyTable, rows: Sequence[str], measured: dict[str, list[list[dict[str, Any]]]], spec: StudySpec
) -> dict[str, Table]:
    """Returns three tables for one of the recipe's: ratios, steps of a probe, and the ratios of the released code.

    Args:
        name: name of the table in the recipe.
        table: its settings.
        rows: methods, in order.
        measured: results of `measure` by row, seed and pair.
        spec: settings of the study.
    """
    main = (*MAIN, *(HELD_OUT if table.held_out else ()))
    space = "on the subspace common to both tasks" if table.space == "common" else f"with a ridge of {table.ridge:g}"
    notes = {
        name: f"Condition numbers over the non-zero spectrum, {space}. (i) should be large, (ii) at most 1; RIR is "
        "(i) / (ii), and RIR* the bound that no linear extractor exceeds; immunized: share of pairs with (i) above 1 "
        "and (ii) at most 1.",
        f"{name}_convergence": f"tau: steps of constant-step gradient descent until {spec.tau_q:.0%} of the removable "
        "loss is gone, predicted from the spectrum"
        + (f", and measured by running it (at most {spec.tau_steps} steps; a dash: more)" if spec.tau_steps else "")
        + "; ratio: over the identity's.",
        f"{name}_published": "The same ratios as the paper's released code computes them, on all directions of the "
        f"features, with {PUBLISHED_FLOOR:g} added to every eigenvalue: only for comparison with the paper's numbers.",
    }
    titles = {
        name: table.title,
        f"{name}_convergence": f"{table.title}: how fast a probe learns",
        f"{name}_published": f"{table.title}: published-code variant",
    }
    convergence = [c for c in CONVERGENCE if spec.tau_steps or not c.endswith("_measured")]
    columns = {name: main, f"{name}_convergence": convergence, f"{name}_published": PUBLISHED}
    return {
        key: Table(
            title=titles[key],
            note=notes[key],
            rows=[
                {
                    "method": row,
                    **{
                        c: _cell(measured[row], c, table.paper.get(row, {}).get(c.removeprefix("published_")))
                        for c in cells
                    },
                }
                for row in rows
            ],
        )
        for key, cells in columns.items()
    }


def _cell(seeds: Sequence[Sequence[dict[str, Any]]], column: str, paper: float | None) -> Cell:
    """Mean over pairs, then mean and standard deviation over seeds."""
    return Cell.of((mean_of([pair.get(column) for pair in pairs]) for pairs in seeds), paper)


def study_figures(
    name: str, table: StudyTable, rows: Sequence[str], measured: dict[str, list[list[dict[str, Any]]]], pairs: Pairs
) -> dict[str, Figure]:
    """Returns the norm-ratio curves of a single pair, or a map of many pairs."""
    if len(pairs) > 1:
        return {f"{name}_map": _map(table, [r for r in rows if r != IDENTITY], measured, pairs)}
    figures: dict[str, Figure] = {}
    for variant, floor in (("", ""), ("published_", ", published-code variant")):
        for role in ("restricted", "benign"):
            key = f"{variant}norm_ratios_{role}"
            curves = {row: measured[row][0][0].get(key) for row in rows}
            if all(curves.values()):
                figures[f"{name}_{key}"] = Lines(
                    title=f"{table.title}: norm ratio on the {role} task{floor}",
                    x_title="step of gradient descent with exact line search",
                    y_title="norm ratio (Eq. 16)",
                    x=[float(t) for t in range(len(next(iter(curves.values()))))],  # type: ignore[arg-type]
                    series={row: curve or [] for row, curve in curves.items()},
                )
    return figures


def _map(table: StudyTable, rows: Sequence[str], measured: dict[str, list[list[dict[str, Any]]]], pairs: Pairs) -> Map:
    names = list(dict.fromkeys(benign.name for _, benign, _ in pairs))

    def panel(row: str) -> list[list[float | None]]:
        grid: list[list[float | None]] = [[None] * len(names) for _ in names]
        for i, (_, benign, restricted) in enumerate(pairs):
            rir = mean_of([seed[i]["rir"] for seed in measured[row]])
            grid[names.index(restricted.name)][names.index(benign.name)] = math.log10(rir) if rir else None
        return grid

    return Map(
        title=f"{table.title}: log10 RIR of every pair",
        row_title="restricted class",
        column_title="benign class",
        value_title="log10 RIR",
        rows=names,
        columns=names,
        panels={row: panel(row) for row in rows},
    )


def study_findings(
    table: StudyTable, rows: Sequence[str], measured: dict[str, list[list[dict[str, Any]]]], pairs: Pairs
) -> list[str]:
    """Says which methods immunize by Definition 3.1 (a) and (b): one sentence for a single pair, else one a method."""
    methods = [row for row in rows if row != IDENTITY]
    failed = {
        row: [i for i in range(len(pairs)) if not all(seed[i]["immunized"] for seed in measured[row])]
        for row in methods
    }
    if len(pairs) == 1:
        good = [
            f"{row} ({mean_of([s[0]['rir'] / s[0]['rir_bound'] for s in measured[row]]):.1%} of RIR*)"
            for row in methods
            if not failed[row]
        ]
        bad = [row for row in methods if failed[row]]
        text = f"{table.title}: (i) above 1 and (ii) at most 1 in every seed: {', '.join(good) or 'no method'}."
        return [text + (f" Not: {', '.join(bad)}." if bad else "")]
    sentences = []
    for row in methods:
        above = sum((mean_of([s[i]["rir"] for s in measured[row]]) or 0) > 1 for i in range(len(pairs)))
        text = f"{row}: {len(pairs) - len(failed[row])} of {len(pairs)} pairs have (i) above 1 and (ii) at most 1 in "
        text += f"every seed; {above} have RIR above 1."
        if failed[row]:
            shown = [f"{pairs[i][0]} {_pair_ratios(measured[row], i)}" for i in failed[row][:4]]
            more = f" and {len(failed[row]) - 4} more" if len(failed[row]) > 4 else ""
            text += f" Not: {', '.join(shown)}{more}."
        sentences.append(text)
    return sentences


def _pair_ratios(seeds: Sequence[Sequence[dict[str, Any]]], pair: int) -> str:
    return "((i) {:.3g}, (ii) {:.3g})".format(*(mean_of([seed[pair][k] for seed in seeds]) or 0.0 for k in MAIN[:2]))
