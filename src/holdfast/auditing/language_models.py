"""What language models write on the restricted topic, and what else they can do.

Both before any attack, and after the one that ended best on each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast.adversaries import Adversary
from holdfast.auditing.trials import TrialContext
from holdfast.errors import HoldfastError
from holdfast.metrics.harness import check_measure, harness_scores
from holdfast.models import CausalModel, SplitModel
from holdfast.models.sampled_text import continuations, tokenizer_of
from holdfast.results import ROLES, Curve, LanguageScale, MeasuredScore, Role, WrittenText
from holdfast.results.tables import Cell, Table
from holdfast.runtime.run import derive_seed
from holdfast.tasks import NextTokenTask, Task

ROWS, TOKENS = 3, 48
"""Test rows that are continued, and how many tokens are written at most."""


def language_scale(task: Task, sample: Task) -> LanguageScale | None:
    """Returns the scale of a task's likelihoods; None if the task has none.

    Args:
        task: the restricted task.
        sample: the adversary's samples of it.
    """
    if not isinstance(task, NextTokenTask) or not isinstance(sample, NextTokenTask) or task.measure != "nll":
        return None
    return LanguageScale(unigram_nll=task.chance, tokens_per_sample=sample.tokens("train") / sample.size("train"))


def check_measures(measures: Sequence[str], models: Sequence[SplitModel]) -> None:
    """Refuses further measures that cannot be taken of these models.

    Raises:
        HoldfastError: for an unknown measure, another kind of model, or a tokenizer that is not found.
    """
    for measure in measures:
        check_measure(measure)
        for model in models:
            if not isinstance(model, CausalModel):
                raise HoldfastError(
                    f"{model.name} is not a causal language model, which the measure {measure!r} needs."
                )
    if measures and next(filter(None, map(tokenizer_of, models)), None) is None:
        raise HoldfastError(
            f"The tokenizer of {models[0].name} was not found, and the measure {measures[0]!r} needs it. Name "
            "the models by folders of transformers, or set model.tokenizer to a folder with its tokenizer.json."
        )


def texts_and_measures(
    context: TrialContext, adversaries: Sequence[Adversary], curves: Sequence[Curve], measures: Sequence[str] = ()
) -> tuple[list[WrittenText], list[MeasuredScore]]:
    """Lets each model continue some test rows, and measures it, before and after the attack that ended best on it.

    The attack is run once more, with the first seed. Fresh models are not measured, but a reference is.

    Args:
        context: models, samples and budgets of the audit.
        adversaries: those that were run.
        curves: their results on the restricted task.
        measures: see `AuditSpec.measures`.

    Returns:
        Texts and scores by role; none for models of other kinds, or if no model's tokenizer is found.
    """
    task, run = context.samples["restricted", 0], context.run
    if not isinstance(task, NextTokenTask):
        return [], []
    tokenizer = next(filter(None, map(tokenizer_of, (context.immunized, context.original))), None)
    if tokenizer is None:
        run.say("The tokenizer of the models was not found, so the report does not show what they write")
        return [], []
    seed = derive_seed(run.seed, "written texts")
    texts: list[WrittenText] = []
    scores: list[MeasuredScore] = []
    for role, adversary, model in _stages(context, task, adversaries, curves):
        on_device = model.clone().to(run.device)  # the caller's model stays where it is
        assert isinstance(on_device, CausalModel)
        written = continuations(on_device, task, tokenizer, rows=ROWS, tokens=TOKENS, seed=seed)
        texts += [
            WrittenText(role=role, adversary=adversary, row=row, prompt=before, text=after)
            for row, (before, after) in enumerate(written)
        ]
        for measure in measures if role != "scratch" or context.reference is not None else ():
            run.say(f"Measuring {measure} of the {role} model{f' after {adversary}' if adversary else ''}")
            scores += [
                MeasuredScore(role=role, adversary=adversary, measure=each.task, metric=each.metric, score=each.value)
                for each in harness_scores(on_device, tokenizer, measure, run=run)
            ]
    return texts, scores


def _stages(
    context: TrialContext, task: Task, adversaries: Sequence[Adversary], curves: Sequence[Curve]
) -> Iterator[tuple[Role, str | None, SplitModel]]:
    """Each model as received, and after the attack that ended best on it, with its name."""
    for role in ROLES:
        model, best = context.model(role, 0), _best(curves, role, adversaries)
        yield role, None, model
        if best is not None:
            kept: list[SplitModel] = []
            best.attack(
                model, task, budgets=[context.budgets[-1]], run=context.run, role=role, benign=context.benign,
                keep=kept.append,
            )  # fmt: skip
            yield role, best.name, kept[0]


def measured(scores: Sequence[MeasuredScore]) -> Table:
    """Returns the table of further measures: a row for each model and stage, a column for each measure."""
    rows: dict[tuple[str, str], dict[str, str | Cell]] = {}
    for each in scores:
        after = each.adversary or "no attack"
        row = rows.setdefault((each.role, after), {"model": each.role, "after": after})
        row[f"{each.measure}: {each.metric}"] = Cell.of([each.score])
    return Table(
        title="What else the models can do",
        note="Before any attack, and after the one that ended best on each model, with its first seed.",
        rows=list(rows.values()),
    )


def _best(curves: Sequence[Curve], role: Role, adversaries: Sequence[Adversary]) -> Adversary | None:
    """The adversary whose mean score at the last budget is the highest; None if none has a score."""
    by_name: dict[str, list[float]] = {}
    for curve in curves:
        last = curve.scores[-1]
        if curve.role == role and curve.task == "restricted" and last is not None:
            by_name.setdefault(curve.adversary, []).append(last)
    known = [a for a in adversaries if a.name in by_name]
    return max(known, key=lambda a: sum(by_name[a.name]) / len(by_name[a.name]), default=None)
