"""What language models write on the restricted topic: before any attack, and after the best one on each."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.adversaries import Adversary
from holdfast.auditing.trials import TrialContext
from holdfast.models import CausalModel, SplitModel
from holdfast.models.sampled_text import continuations, tokenizer_of
from holdfast.results import ROLES, Curve, LanguageScale, Role, WrittenText
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


def written_texts(
    context: TrialContext, adversaries: Sequence[Adversary], curves: Sequence[Curve]
) -> list[WrittenText]:
    """Lets each model continue some test rows, before and after the attack that ended best on it.

    The attack is run once more, with the first seed.

    Args:
        context: models, samples and budgets of the audit.
        adversaries: those that were run.
        curves: their results on the restricted task.

    Returns:
        Texts by role; none for models of other kinds, or if no model's tokenizer is found.
    """
    task = context.samples["restricted", 0]
    models = (context.immunized, context.original)
    if not isinstance(task, NextTokenTask):
        return []
    tokenizer = next(filter(None, map(tokenizer_of, models)), None)
    if tokenizer is None:
        context.run.say("The tokenizer of the models was not found, so the report does not show what they write")
        return []
    seed = derive_seed(context.run.seed, "written texts")

    def of(model: SplitModel, role: Role, adversary: str | None) -> list[WrittenText]:
        on_device = model.clone().to(context.run.device)  # the caller's model stays where it is
        assert isinstance(on_device, CausalModel)
        written = continuations(on_device, task, tokenizer, rows=ROWS, tokens=TOKENS, seed=seed)
        return [
            WrittenText(role=role, adversary=adversary, row=row, prompt=before, text=after)
            for row, (before, after) in enumerate(written)
        ]

    texts: list[WrittenText] = []
    for role in ROLES:
        model, best = context.model(role, 0), _best(curves, role, adversaries)
        texts += of(model, role, None)
        if best is not None:
            kept: list[SplitModel] = []
            best.attack(
                model, task, budgets=[context.budgets[-1]], run=context.run, role=role, benign=context.benign,
                keep=kept.append,
            )  # fmt: skip
            texts += of(kept[0], role, best.name)
    return texts


def _best(curves: Sequence[Curve], role: Role, adversaries: Sequence[Adversary]) -> Adversary | None:
    """The adversary whose mean score at the last budget is the highest; None if none has a score."""
    by_name: dict[str, list[float]] = {}
    for curve in curves:
        last = curve.scores[-1]
        if curve.role == role and curve.task == "restricted" and last is not None:
            by_name.setdefault(curve.adversary, []).append(last)
    known = [a for a in adversaries if a.name in by_name]
    return max(known, key=lambda a: sum(by_name[a.name]) / len(by_name[a.name]), default=None)
