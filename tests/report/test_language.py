"""What a report says about language models: nats, perplexity, and what they write."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from holdfast.report import language
from holdfast.report.html import render
from holdfast.results import LanguageScale, WrittenText
from made_results import make_audit, make_result


@pytest.fixture
def result():
    made = make_result(audit=make_audit())
    scale = LanguageScale(unigram_nll=4.0, tokens_per_sample=32.0)
    texts = [
        WrittenText(role=role, adversary=adversary, prompt="Once <b>upon", text=f"<script>{role}</script>")
        for role in ("immunized", "original", "scratch")
        for adversary in (None, "direct")
    ]
    audit = made.audit.model_copy(update={"language": scale, "texts": texts, "unit": "language skill"})
    return made.model_copy(update={"audit": audit})


def test_nats_and_perplexity_are_those_of_the_skill(result):
    rows = language.in_nats(result.audit)
    assert [row["budget"] for row in rows] == result.audit.budgets
    mean = result.audit.by_budget[-1].best["immunized"].mean
    nll = 4.0 * (1 - mean)
    assert rows[-1]["immunized"] == (f"{nll:.3f}", f"{math.exp(nll):.4g}")


def test_texts_stand_side_by_side_and_are_escaped(result):
    ((prompt, stages),) = language.written(result.audit)
    assert prompt == "Once <b>upon"
    assert [stage for stage, _ in stages] == ["before", "after the attack"]
    page = render(result, Path("runs/x"))
    assert "&lt;script&gt;immunized&lt;/script&gt;" in page
    assert "<script>immunized" not in page
    assert "Once &lt;b&gt;upon" in page


def test_other_audits_have_neither(result):
    plain = result.audit.model_copy(update={"language": None, "texts": []})
    assert language.in_nats(plain) == []
    assert language.written(plain) == []
