"""What a report says about language models beside their skill: nats, perplexity, and what the models write."""

from __future__ import annotations

import math
from typing import Any

from holdfast.results import ROLES, AuditResult, WrittenText


def in_nats(audit: AuditResult) -> list[dict[str, Any]]:
    """Returns the best scores by budget and role as nats a token and perplexity, for language models; else nothing."""
    if audit.language is None:
        return []
    rows: list[dict[str, Any]] = []
    for row in audit.by_budget:
        shown: dict[str, Any] = {"budget": row.budget}
        for role in ROLES:
            mean = row.best[role].mean
            nll = None if mean is None else audit.language.nll(mean)
            shown[role] = ("-", "-") if nll is None else (f"{nll:.3f}", f"{math.exp(min(nll, 700)):.4g}")
        rows.append(shown)
    return rows


def written(audit: AuditResult) -> list[tuple[str, list[tuple[str, dict[str, WrittenText]]]]]:
    """Returns the texts that models wrote, by prompt, then by stage (before and after the attack) and role."""
    prompts: dict[tuple[int, str], dict[str, dict[str, WrittenText]]] = {}
    for text in audit.texts:
        stage = "before" if text.adversary is None else "after the attack"
        prompts.setdefault((text.row, text.prompt), {}).setdefault(stage, {})[text.role] = text
    return [(prompt, list(stages.items())) for (_, prompt), stages in prompts.items()]
