"""Table 3 of the ICML 2025 paper: RIR_theta0 of each immunized model of a protocol, and its two ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import Field

from holdfast.defenses import FrontierDefense
from holdfast.errors import HoldfastError
from holdfast.experiments.measurements.base import MEASUREMENTS, Measured, Measurement
from holdfast.experiments.setting import ORIGINAL, Setting
from holdfast.experiments.setting_scores import PaperSpec, Printed, SettingScores, about_paper, mean_and_sd
from holdfast.metrics.rir import GroupRatios, GroupSpectra, check_groups, group_spectra
from holdfast.models import SplitModel
from holdfast.results.tables import Cell, Outcome, Table
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run

Place = tuple[str, str, int]
"""Setting, model (`original` or a defense) and seed of the defense."""


@MEASUREMENTS.register("conditioning")
class Conditioning(Measurement):
    """Condition numbers of a protocol's models, on groups of samples."""

    groups: int = Field(20, ge=1, description="Groups of samples; their mean and spread are shown. The paper's: 20.")
    samples: int = Field(100, ge=2, description="Samples of a group. The paper's: 100.")

    def check(self, settings: Mapping[str, Setting]) -> None:
        """Refuses settings whose tasks have too few samples, or whose features are not vectors."""
        for name, setting in settings.items():
            try:
                check_groups(setting.benign, setting.adversary_data, groups=self.groups, samples=self.samples)
            except HoldfastError as error:
                raise HoldfastError(f"conditioning, in setting {name!r}: {error}") from error

    def measure(self, protocol: Measured) -> Outcome:
        """Returns the table `conditioning`, and a sentence for each defense."""
        context = protocol.context
        spectra = spectra_of(self, context.settings, context.models, run=context.run, executor=protocol.executor)
        return lay_out(self, protocol.scores, spectra)


@dataclass(frozen=True)
class _Context:
    """Input of all measurements; sent once to each worker."""

    spec: Conditioning
    settings: Mapping[str, Setting]
    models: Mapping[Place, SplitModel]
    run: Run


def spectra_of(
    spec: Conditioning,
    settings: Mapping[str, Setting],
    immunized: Mapping[Place, SplitModel],
    *,
    run: Run,
    executor: Executor,
) -> dict[Place, GroupSpectra]:
    """Returns the spectra of all originals and immunized models; with a folder in `run`, each is stored at once.

    All models of a setting get the same samples: from the benign task's test split, and from the adversary's half of
    the restricted training data. No defense has trained on either.

    Args:
        spec: number of samples.
        settings: by name.
        immunized: by setting, label and seed.
        run: its seed draws the samples.
        executor: where jobs run; it does not change the result.
    """
    models = {(name, ORIGINAL, 0): setting.original for name, setting in settings.items()} | dict(immunized)
    journal = Journal(
        run.path("conditioning.jsonl"),
        {
            "seed": run.seed,
            "conditioning": spec.model_dump(),
            "data": {n: [s.benign.facts().sha256, s.adversary_data.facts().sha256] for n, s in settings.items()},
            "models": {json.dumps(place): model.facts().sha256 for place, model in models.items()},
        },
        "protocol",
    )
    jobs = [Job(json.dumps(p, ensure_ascii=False), p, f"{p[1]}, seed {p[2]}") for p in models]
    store = JournalStore(journal, {job.key: partial(_kept, spec.groups) for job in jobs})
    context = _Context(spec, settings, models, run)
    spectra = run_jobs(_measure, context, jobs, store, run=run, executor=executor, description="Condition numbers")
    return dict(zip(models, spectra, strict=True))


def _kept(groups: int, entry: Any) -> GroupSpectra:
    """Reads the spectra of a model from their entry in the journal; refuses another number of groups."""
    spectra = GroupSpectra.model_validate(entry)
    if {len(value) for _, value in spectra} != {groups}:
        raise ValueError(f"it does not have {groups} groups")
    return spectra


def _measure(context: _Context, place: Place) -> GroupSpectra:
    setting = context.settings[place[0]]
    return group_spectra(
        context.models[place].clone().to(context.run.device),
        setting.benign,
        setting.adversary_data,
        groups=context.spec.groups,
        samples=context.spec.samples,
        seed=context.run.seed,
    )


def lay_out(spec: Conditioning, settings: Sequence[SettingScores], spectra: Mapping[Place, GroupSpectra]) -> Outcome:
    """Returns the table `conditioning`, and a sentence for each defense.

    Args:
        spec: number of samples.
        settings: the settings.
        spectra: the result of `spectra_of`.
    """
    rows: list[dict[str, str | Cell]] = []
    findings: list[str] = []
    for setting in settings:
        original = spectra[setting.name, ORIGINAL, 0]
        ratios = {
            label: [
                GroupRatios.of(original, model)
                for (name, own, _), model in spectra.items()
                if (name, own) == (setting.name, label)
            ]
            for label in (ORIGINAL, *setting.labels)
        }
        bound = Cell.of(original.bounds)
        first = {"setting": setting.name} if len(settings) > 1 else {}
        rows += [{**first, **_row(setting, label, own, bound)} for label, own in ratios.items()]
        prefix = f"{setting.name}: " if len(settings) > 1 else ""
        findings += [prefix + text for text in _findings(setting, ratios)]
    return Outcome(
        {"conditioning": Table(title="RIR of deep features", rows=rows, note=_note(spec, settings))}, {}, findings
    )


def _row(setting: SettingScores, label: str, ratios: Sequence[GroupRatios], bound: Cell) -> dict[str, str | Cell]:
    paper = setting.paper.get(label, PaperSpec())
    benign, percent = setting.benign(label), setting.benign_measure.percent
    row: dict[str, str | Cell] = {
        "model": label,
        "ratio_restricted": _cell(ratios, "restricted", paper.ratio_restricted),
        "ratio_benign": _cell(ratios, "benign", paper.ratio_benign),
        "rir": _cell(ratios, "rir", paper.rir),
        "rir_bound": bound,
        "benign_percent" if percent else "benign": _in_percent(benign) if percent else benign,
    }
    changed = _changes(ratios)
    return row | ({"other rank": "; ".join(changed)} if changed else {})


def _cell(ratios: Sequence[GroupRatios], name: str, printed: Printed | None = None) -> Cell:
    return Cell.of((v for each in ratios for v in getattr(each, name)), *mean_and_sd(printed))


def _in_percent(cell: Cell) -> Cell:
    """The table as a whole cannot be shown in percent, because its other columns are not shares."""
    values = {k: None if (v := getattr(cell, k)) is None else 100 * v for k in ("mean", "sd", "paper", "paper_sd")}
    return cell.model_copy(update=values)


def _changes(ratios: Sequence[GroupRatios]) -> list[str]:
    """By task, in how many groups the rank of the features differs from the original's."""
    texts = []
    for task in ("restricted", "benign"):
        changed = [pair for each in ratios for pair in getattr(each, f"{task}_ranks")]
        if changed:
            before, after = ({pair[side] for pair in changed} for side in (0, 1))
            spans = " to ".join(f"{min(r)}" if len(r) == 1 else f"{min(r)}-{max(r)}" for r in (before, after))
            texts.append(f"{task} {spans} in {len(changed)} of {sum(len(each.rir) for each in ratios)}")
    return texts


def _findings(setting: SettingScores, ratios: Mapping[str, Sequence[GroupRatios]]) -> list[str]:
    means = {label: _cell(own, "rir").mean for label, own in ratios.items()}
    frontiers = {
        label: mean
        for label in setting.labels
        if (mean := means[label]) is not None and setting.defense(label) == FrontierDefense.name
    }
    best = max(frontiers, key=lambda label: frontiers[label], default=None)
    sentences = []
    for label in setting.labels:
        own, mean = ratios[label], means[label]
        text = _about(label, own)
        if best is not None and mean is not None and setting.defense(label) not in (FrontierDefense.name, None):
            ahead = "more" if mean > frontiers[best] else "less"
            text += (
                f" That is {ahead} than the {frontiers[best]:.3g} of {best}, the closed form before the head of the "
                "original, on the same samples."
            )
        changed = _changes(own)
        if changed:
            text += (
                f" The rank of the features changed ({'; '.join(changed)} groups), so these condition numbers cover "
                "other directions than the original's, and their ratios are not comparable."
            )
        sentences.append(text)
    return sentences


def _about(label: str, ratios: Sequence[GroupRatios]) -> str:
    parts = [_cell(ratios, name) for name in ("restricted", "benign", "rir")]
    if any(cell.mean is None for cell in parts):
        return f"{label}: RIR is not defined, because features are not finite or all zero in some groups."
    first, second, rir = parts
    one, two, three = (cell.mean or 0.0 for cell in parts)
    checks = [
        "(i) is above 1" if one > 1 else "(i) is not above 1: the restricted probe is not worse conditioned",
        "(ii) at most 1" if two <= 1 + 1e-9 else "(ii) is above 1: the benign probe is worse conditioned, too",
        "RIR above 1" if three > 1 else "RIR is not above 1",
    ]
    groups = sum(len(each.rir) for each in ratios)
    return (
        f"{label}: RIR is {_spread(rir)}, from (i) {_spread(first)} and (ii) {_spread(second)}; {'; '.join(checks)}. "
        f"(i) is above 1 and (ii) at most 1 together in {sum(each.immunized for each in ratios)} of {groups} groups."
    )


def _spread(cell: Cell) -> str:
    return f"{cell.mean:.3g}" + ("" if cell.sd is None else f" ± {cell.sd:.2g}")


def _note(spec: Conditioning, settings: Sequence[SettingScores]) -> str:
    repeated = max(
        (sum(label == own for own, _ in setting.made) for setting in settings for label in setting.labels), default=1
    )
    over = f"{spec.groups} groups" + (f" of each of {repeated} immunizations" if repeated > 1 else "")
    unit = settings[0].benign_measure
    return (
        f"Condition numbers of a linear probe's Hessian on groups of {spec.samples} samples (Eq. 17), over the "
        f"original's on the same samples, in float64: mean ± standard deviation over {over}; of benign {unit.name}, "
        "over immunizations. Restricted samples are the adversary's, benign ones the test split's: no defense trained "
        "on them. (i) should be above 1, (ii) at most 1; RIR is (i) / (ii) of each group. RIR*: the bound that no "
        "linear extractor before the original's head exceeds on these samples; a dash: no bound, since the samples of "
        f"the two tasks span different directions.{about_paper(settings)}"
    )
