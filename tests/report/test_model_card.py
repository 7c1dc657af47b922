"""The card: bound to the weights, kept inside of its markers, and true to the result."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from holdfast.errors import HoldfastError
from holdfast.report.model_card import BEGIN, END, card, hashes, put
from made_results import FLAGS, NASTY, make_audit, make_immunization, make_result

FILE = "9a" * 32


def front_matter(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_says_what_the_result_says():
    text = card(make_result(audit=make_audit("partial", flags=FLAGS), immunization=make_immunization()), FILE)
    for part in (
        "**Verdict: partial.** The sentence of a verdict that partial.",
        "**It holds for:** An adversary with 337 samples, and nothing else.",
        "| Benign accuracy, before and after | 98.1%, 95.4% |",
        "| Best adversary after 100 steps | immunized 62.0%; original 88.0%; scratch 59.0% |",
        "| Largest advantage over training from scratch | +3.0 points after 100 steps (95%: +3.0 to +3.0) |",
        "| Retained of the original's advantage | 13% (95%: 4% to 25%) |",
        "- **Poisoned BatchNorm statistics** (critical): Found &lt;this&gt;. Recalibrate.",
        "- More data: more than 337 labelled samples",
        "$ holdfast card README.md --check model.safetensors",
        "$ holdfast run 'a recipe'",
    ):
        assert part in text
    assert hashes(text).tensors == "b2" * 32
    assert hashes(text).file == FILE


def test_front_matter_is_what_hugging_face_reads():
    found = front_matter(card(make_result(audit=make_audit())))
    assert "holdfast" in found["tags"]
    entry = found["model-index"][0]
    assert entry["name"] == "A test of the report"
    for result in entry["results"]:
        assert result["task"]["type"]
        assert result["dataset"]["name"]
        assert result["dataset"]["type"]
        assert all({"type", "value"} <= set(metric) for metric in result["metrics"])
    values = {m["name"]: m["value"] for r in entry["results"] for m in r["metrics"]}
    assert values["Best adversary after 100 steps of fine-tuning"] == 0.62
    assert values["Benign score"] == 0.954


def test_an_invalid_audit_gives_reasons_and_no_index_of_results():
    text = card(make_result(audit=make_audit("invalid")))
    assert "**Verdict: invalid.**" in text
    assert "- First reason & more.".replace("&", "&amp;") in text
    assert "**What was tried:**" in text
    assert "It holds for" not in text
    tasks = [r["task"]["type"] for r in front_matter(text)["model-index"][0]["results"]]
    assert tasks == ["benign-task"]


def test_a_command_stays_inside_its_code_block():
    result = make_result(audit=make_audit())
    argument = f"a\n```\n# Resists\n{END} é"
    result.provenance.command[:] = ["holdfast", "audit", argument]
    text = card(result)
    assert (text.count(END), text.count("```")) == (1, 2)
    (line,) = [line for line in text.splitlines() if line.startswith("$ holdfast audit")]
    shown = subprocess.run(["bash", "-c", f"printf %s {line.partition('audit ')[2]}"], capture_output=True, check=True)
    assert shown.stdout.decode() == argument


def test_a_result_without_the_weights_hash():
    result = make_result(audit=make_audit())
    del result.provenance.models["immunized"]
    with pytest.raises(HoldfastError, match="does not say which weights"):
        card(result)


def test_only_its_section_is_replaced():
    result, other = make_result(audit=make_audit("fails")), make_result(audit=make_audit("resists"))
    readme = "---\nlicense: mit\ntags:\n- own\n---\n# Mine\n\nBefore.\n"
    first = put(readme, result)
    assert first.startswith("---\nlicense: mit\ntags:\n- own\n# holdfast:begin\nmodel-index:")
    assert front_matter(first)["tags"] == ["own"], "a key that the README has is its own"
    assert "# Mine\n\nBefore.\n\n<!-- holdfast:begin -->" in first
    more = first + "\nAfter.\n"
    second = put(more, other)
    assert "Verdict: resists" in second
    assert "Verdict: fails" not in second
    assert second.partition(END)[2] == more.partition(END)[2]
    assert second.partition(BEGIN)[0].partition("# Mine")[2] == more.partition(BEGIN)[0].partition("# Mine")[2]
    assert put(second, other) == second
    assert put(put(second, result), other) == second


@pytest.mark.parametrize(
    ("readme", "words"),
    [
        (f"text {BEGIN} text", "odd set of markers"),
        (f"{END} text {BEGIN}", "odd set of markers"),
        (f"{BEGIN}{END}{BEGIN}{END}", "odd set of markers"),
        ("---\n[1\n---\n", "not valid YAML"),
        ("---\n- a\n---\n", "is not a mapping"),
    ],
)
def test_a_readme_that_cannot_be_kept_is_refused(readme, words):
    with pytest.raises(HoldfastError, match=words):
        put(readme, make_result(audit=make_audit()))


def test_names_stay_text():
    text = card(make_result(audit=make_audit(names=("a|b `c` [d]", "e"))))
    assert r"| Best adversary | a\|b \`c\` \[d\] |" in text
    nasty = card(make_result(title=NASTY, audit=make_audit(names=(NASTY, "e"))))
    assert "<img" not in nasty.partition(BEGIN)[2]
    assert front_matter(nasty)["model-index"][0]["name"] == NASTY


def test_without_an_audit_or_a_card_there_is_nothing_to_say():
    with pytest.raises(HoldfastError, match="was not audited"):
        card(make_result(kind="immunize", immunization=make_immunization()))
    with pytest.raises(HoldfastError, match="There is no card in it"):
        hashes("# A README\n")
