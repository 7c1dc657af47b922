"""The report: what it says, that it is safe and self-contained, and that a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.auditing.audit import tables
from holdfast.auditing.retention import benign_bounds
from holdfast.auditing.statistics import Comparison
from holdfast.report import write_report
from holdfast.report.html import render
from holdfast.report.terminal import show
from holdfast.report.trade_off import trade_off_plots
from holdfast.results import (
    ROLES,
    Interval,
    Role,
    RunResult,
    Side,
    VerdictLabel,
)
from holdfast.results.image_grid import draw
from holdfast.results.tables import Cell, Table
from made_results import (
    BUDGETS,
    FLAGS,
    FOLDER,
    NASTY,
    make_audit,
    make_immunization,
    make_result,
)

LABELS: tuple[VerdictLabel, ...] = ("resists", "partial", "fails", "invalid")


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and text by section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles = ""
        self.words: list[str] = []
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside == "style":
            self.styles += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def figure(self, name: str) -> dict[str, Any]:
        found = [text for attrs, text in self.scripts if attrs.get("id") == f"plot-{name}-data"]
        return dict(json.loads(found[0]))


def html_of(result: RunResult) -> str:
    return render(result, FOLDER)


def page(**parts: Any) -> Page:
    return Page(html_of(make_result(**parts)))


def row(source: str, heading: str) -> str:
    """The first table row with a heading, as plain text."""
    found = re.search(rf'<tr><th scope="row">{re.escape(heading)}</th>(.*?)</tr>', _tight(source), re.DOTALL)
    assert found, heading
    return " ".join(re.sub(r"<[^>]*>", " ", found[1]).split())


def _tight(source: str) -> str:
    return re.sub(r">\s+<", "><", source)


@pytest.mark.parametrize("label", LABELS)
def test_verdict_is_first_and_said_in_word_glyph_and_colour(label: VerdictLabel) -> None:
    audit = make_audit(label)
    source = html_of(make_result(audit=audit, immunization=make_immunization()))
    top = source[source.index("<body>") : source.index('class="cards"')]
    assert f"Verdict: {label.capitalize()}</span></h2>" in top
    assert f'class="glyph glyph-{label}"' in top
    assert f'class="verdict tone-{label}"' in top
    assert audit.verdict.sentence in top
    assert audit.verdict.threat_model in top
    assert f"<title>{label.capitalize()}: " in source
    text = Page(source).text
    assert f"Verdict: {label}." in text
    assert all(reason.text in text for reason in audit.verdict.reasons)
    assert ("not evidence for or against" in text) == (label == "invalid")


def test_nothing_is_loaded_from_anywhere() -> None:
    seen = page(audit=make_audit(), immunization=make_immunization())
    for tag, attrs in seen.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "background"):
            value = attrs.get(name)
            assert value is None or value.startswith("#"), f"<{tag} {name}={value!r}>"
        assert "url(" not in (attrs.get("style") or "")
    assert "url(" not in seen.styles
    assert "@import" not in seen.styles
    policy = [m["content"] for m in seen.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0] is not None
    assert policy[0].startswith("default-src 'none'")
    assert "http" not in policy[0]
    assert any("Plotly, Inc." in text for _, text in seen.scripts), "plotly.js is inlined"


def test_names_are_escaped_in_text_in_attributes_and_in_figures() -> None:
    audit = make_audit(names=(NASTY, "other"))
    seen = page(title=NASTY, audit=audit, immunization=make_immunization(), recipe={"title": NASTY})
    assert not seen.all("img")
    assert not any("alert" in text for attrs, text in seen.scripts if attrs.get("type") is None)
    assert " ".join(NASTY.split()) in seen.text
    hover = seen.figure("best")["data"][0]["customdata"][-1]
    assert "&lt;img" in hover
    assert "<img" not in hover
    assert any(NASTY in (attrs.get("aria-label") or "") for attrs in seen.all("div"))


def test_provenance_is_complete() -> None:
    result = make_result(audit=make_audit(), immunization=make_immunization())
    source = html_of(result)
    text = Page(source).text
    facts = result.provenance
    digests = [t.sha256 for t in facts.tasks.values()]
    digests += [d for m in facts.models.values() for d in (m.sha256, m.file_sha256) if d is not None]
    assert len(digests) == 5
    for digest in digests:
        assert f'<code class="hash">{digest}</code>' in source
    for fact in (facts.started, facts.python, facts.platform, facts.git_commit, "holdfast run 'a recipe'"):
        assert fact is not None
        assert fact in text
    assert "torch 2.99.1, numpy 2.98.2" in text
    assert "immunize 12.3 s, audit 56.8 s" in text
    assert "Seed 17" in text
    assert "name: sophon learning_rates: - 0.001 - 0.01" in text
    unknown = facts.model_copy(update={"git_commit": None})
    assert "Git commit not known" in page(provenance=unknown, audit=make_audit()).text


def test_key_numbers() -> None:
    text = page(audit=make_audit()).text
    assert "98.1% → 95.4%" in text
    assert f"Change: {chr(0x2212)}2.7 points." in text
    assert "immunized 62.0% original 88.0% scratch 59.0%" in text
    # Budget 0 has the larger advantage (+4.0), but the verdict does not count it.
    assert "worst over budgets +3.0 points 95%: +3.0 to +3.0 After 100 steps; up to +2.0 counts as none." in text
    assert "up to +30.0, after 10 steps" in text
    assert "Advantage retained 13% 95%: 4% to 25% " in text
    assert "the advantage is +2.1 points; the original's is +30.0" in text


def test_tables_show_mean_and_spread_and_mark_the_best() -> None:
    audit = make_audit(lost={("direct+all adam", "scratch"): 2})
    source = html_of(make_result(audit=audit))
    by_budget = row(source, "10")
    minus = chr(0x2212)
    assert by_budget == (
        f"43.0 ± 1.0 46.0 ± 1.0 {minus}3.0 {minus}3.0 to {minus}3.0 76.0 ± 1.0 +30.0 +30.0 to +30.0 direct+all adam"
    )
    battery = _tight(source)[_tight(source).index("Accuracy on digits[5-9] after") :]
    assert row(battery, "direct+all adam") == "▲ 26.0 ± 1.0 ▲ 43.0 ± 1.0 ▲ 62.0 ± 1.0"
    assert row(battery, "initFC+all momentum") == "16.0 ± 1.0 33.0 ± 1.0 52.0 ± 1.0"
    scratch = battery[battery.index("scratch</span>") :]
    assert row(scratch, "direct+all adam") == "▲ 22.0 ± 1.0 ▲ 46.0 ± 1.0 —"
    assert row(scratch, "initFC+all momentum").endswith("▲ 49.0 ± 1.0")


def test_a_missing_number_is_a_dash_and_never_an_advantage() -> None:
    names = ("direct+all adam", "initFC+all momentum")
    lost: dict[tuple[str, Role], int] = dict.fromkeys([(name, "immunized") for name in names], 0)
    audit = make_audit("invalid", lost=lost)
    audit = audit.model_copy(update={"benign": Side(original=0.9, immunized=None, chance=0.1)})
    source = html_of(make_result(audit=audit, immunization=make_immunization()))
    dash = '<span title="not finite or not measured" aria-label="not finite or not measured">—</span>'
    start = re.search(r'<tr><th scope="row">0</th>(.*?)</tr>', _tight(source), re.DOTALL)
    assert start
    assert start[1].count(dash) == 2, "the immunized score and its advantage"
    assert "90.0% → —" in Page(source).text
    text = Page(source).text
    for wrong in (r"\bnan\b", r"\bNone\b(?!:|\.)", r"\binf\b"):
        assert not re.search(wrong, text), wrong


def test_nothing_finite_at_all_is_still_a_report() -> None:
    audit = make_audit("invalid", names=("only",), lost={("only", role): 1 for role in ROLES})
    empty = Cell(mean=None, sd=None, n=0)
    rows = [r.model_copy(update={"best": dict.fromkeys(ROLES, empty)}) for r in audit.by_budget]
    audit = audit.model_copy(update={"by_budget": rows})
    record = make_immunization().model_copy(update={"history": {"iteration": [1.0], "loss": [None]}})
    text = page(audit=audit, immunization=record).text
    assert "Advantage, worst over budgets —" in text
    assert "The defense recorded no finite number" in text


def test_one_seed_has_no_spread() -> None:
    seen = page(audit=make_audit(seeds=1), immunization=make_immunization())
    assert "±" not in re.sub(r"uncertain by about ± \d", "", seen.text)
    assert "One seed: there is no band" in seen.text
    assert [t["name"] for t in seen.figure("advantage")["data"]] == ["original", "immunized"]
    assert "There is only one seed" in seen.text
    assert seen.figure("best")["data"][0]["error_y"]["array"] == [None] * 3
    assert "±" in page(audit=make_audit(seeds=2)).text


def test_the_papers_numbers_stand_beside_ours() -> None:
    audit = make_audit()
    found = tables(audit)
    found["best"].rows[0]["step 10"] = Cell(mean=0.43, sd=0.01, n=3, paper=0.123)
    found["battery"].rows[1]["step 100"] = Cell(mean=None, sd=None, n=3, paper=0.456)
    found["side"] = Table(
        title="Condition numbers",
        rows=[{"method": "stretch", "ratio": Cell(mean=64.8, sd=None, n=1, paper=70.04)}],
    )
    source = html_of(make_result(audit=audit, tables=found))
    assert row(source, "10").startswith("43.0 ± 1.0 paper 12.3 46.0")
    assert row(source, "initFC+all momentum").endswith("— paper 45.6")
    assert row(source, "stretch") == "64.8 paper 70.04"


def test_immunization_alone_is_not_a_verdict() -> None:
    seen = page(kind="immunize", immunization=make_immunization(events=3, completed=False))
    assert "Not audited" in seen.text
    assert "Whether it resists fine-tuning is not known" in seen.text
    assert "The defense gave up early" in seen.text
    assert "Verdict:" not in seen.text
    assert [f"Round {7 + i}: event number {i} <b>" in seen.text for i in range(3)] == [True] * 3
    assert "97.0%" in seen.text
    figure = seen.figure("history")
    marks = [t for t in figure["data"] if t.get("name") == "events"]
    assert marks[0]["x"] == [7, 8, 9]
    assert len(figure["layout"]["shapes"]) == 3
    assert "gave up early" not in page(kind="immunize", immunization=make_immunization()).text


def test_audit_alone_says_that_the_making_is_not_known() -> None:
    seen = page(kind="audit", audit=make_audit("partial"))
    assert "takes the model as it is" in seen.text
    assert not any(attrs.get("id") == "plot-history" for attrs in seen.all("div"))
    assert "Verdict: Partial" in seen.text


def test_what_was_not_tried_follows_from_what_was() -> None:
    text = page(audit=make_audit()).text
    assert "more than 100 steps" in text
    assert "more than 337 labelled samples" in text
    assert "optimizer adam; learning rate 0.001; batch size 50" in text
    assert "low-rank adapters (LoRA), linear probes on prepared features, undoing" in text
    assert "a search for adversaries against this model" in text
    assert "a search for adversaries" not in page(audit=make_audit(searched=4)).text
    assert "whole-body probe : the model has no body" in text
    assert "favours the adversary" in text
    assert "100 samples. That alone makes a score near 50% uncertain by about ± 5.0 points" in text
    assert "low-rank adapters" not in page(audit=make_audit(kind="finetuning", scope="lora")).text


def test_figures_hold_the_results() -> None:
    audit = make_audit()
    seen = page(audit=audit)
    traces = {t["name"]: t for t in seen.figure("best")["data"]}
    for role in ROLES:
        cells = [r.best[role] for r in audit.by_budget]
        assert traces[role]["x"] == BUDGETS
        assert traces[role]["y"] == [c.mean for c in cells]
        assert traces[role]["error_y"]["array"] == [c.sd for c in cells]
        assert "direct+all adam" in traces[role]["customdata"][1]
    assert traces["chance (20.0%)"]["y"] == [0.2, 0.2]
    looks = {(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]) for n, t in traces.items() if n in ROLES}
    assert all(len(set(column)) == len(ROLES) for column in zip(*looks, strict=True))
    second = {t["name"]: t for t in seen.figure("adversary-1")["data"]}
    assert second["original"]["y"] == pytest.approx([0.22, 0.66, 0.78])
    assert "mean training loss: 0.5" in second["original"]["customdata"][2]


def test_the_band_is_drawn_and_written_down() -> None:
    audit = make_audit()
    rows = [
        r.model_copy(update={"interval": Interval(low=-0.05, high=0.01 * k), "original_interval": None})
        for k, r in enumerate(audit.by_budget)
    ]
    rows[0] = rows[0].model_copy(update={"interval": None})
    seen = page(audit=audit.model_copy(update={"by_budget": rows}))
    band = seen.figure("advantage")["data"][0]
    assert band["name"] == "immunized: 95% band"
    assert band["x"] == [10, 100, 100, 10], "budget 0 has no band"
    assert band["y"] == pytest.approx([1.0, 2.0, -5.0, -5.0])
    assert f"95%: {chr(0x2212)}5.0 to +2.0" in seen.text


def test_flags_come_with_severity_remedy_and_page() -> None:
    seen = page(audit=make_audit("invalid", flags=FLAGS))
    assert "2 red flags, 1 critical" in seen.text
    assert "critical Poisoned BatchNorm statistics Found <this>." in seen.text
    assert "Remedy: Recalibrate. In the documentation: red-flags.html#poisoned-batchnorm-statistics" in seen.text
    assert "warning Dead units" in seen.text
    assert "Red flags" not in page(audit=make_audit()).text


def test_costs_are_set_against_scratch_and_never_is_a_word() -> None:
    audit = make_audit()
    source = html_of(make_result(audit=audit))
    costs_at = _tight(source)[_tight(source).index('id="cost"') :]
    found = {
        role: " ".join(re.sub(r"<[^>]*>", " ", match).split())
        for role, match in re.findall(r"</svg>(\w+)</th>(.*?)</tr>", costs_at)[: len(ROLES)]
    }
    # Straight lines between (10, 0.43) and (100, 0.62); (10, 0.46) and (100, 0.59).
    assert found["immunized"] == "63 0.94 × 3,153 1.3e8 0.94 × direct+all adam"
    assert found["scratch"].startswith("67 1 × 3,338")
    never = [c.model_copy(update={"steps": None, "samples": None, "flops": None}) for c in audit.costs]
    assert page(audit=audit.model_copy(update={"costs": never})).text.count("never within the budget") == 3


def test_the_best_attacks_by_benign_score_lost_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    audit = make_audit("fails")
    first, second = audit.adversaries
    costly = {first: 0.5, second: 0.95}
    curves = [
        c if c.role == "scratch" else c.model_copy(update={"benign_after": costly[c.adversary]}) for c in audit.curves
    ]
    bounds = benign_bounds(curves, audit.benign, Comparison.of(curves))
    audit = audit.model_copy(update={"curves": curves, "bounds": bounds})
    page = Page(render(make_result(audit=audit), FOLDER)).text
    section = page[page.index("Best attacks by benign score lost") :]
    assert "Each row is the best attack after which the model has lost at most this share" in section
    assert "measured only after the last budget (100 steps)" in section
    assert re.search(rf"1 % 1 of 2 95\.0.*?{re.escape(second)}.*?any 2 of 2 50\.0.*?{re.escape(first)}", section)
    show(make_result(audit=audit), FOLDER)
    printed = capsys.readouterr().out
    assert re.search(r"1 % +│ +1 of 2 +│ +95\.0 +│ +52\.0", printed)
    assert re.search(r"any +│ +2 of 2 +│ +50\.0 +│ +62\.0", printed)
    older = Page(render(make_result(audit=make_audit("fails")), FOLDER)).text
    assert "Best attacks by benign score lost" not in older


def test_side_effects_and_search_are_shown() -> None:
    seen = page(audit=make_audit(searched=6))
    assert f"Lost: +1.2 points (95%: {chr(0x2212)}1.0 to +3.4)" in seen.text
    assert "faces (transfer task)" in seen.text
    assert "Lost: +20.0 points" in seen.text
    assert "6 trials against each model" in seen.text
    assert "scored on the other half only" in seen.text
    trace = seen.figure("search")["data"][0]
    assert trace["x"] == [1, 2, 3, 4, 5, 6]
    assert trace["y"] == pytest.approx([0.4, 0.41, 0.42, 0.43, 0.44, 0.45])
    assert trace["marker"]["size"] == [3, 3, 3, 3, 11, 11]
    assert not any(a.get("id") == "plot-search" for a in page(audit=make_audit()).all("div"))


def test_the_best_adversary_comes_with_the_command_that_replays_it() -> None:
    command = "holdfast replay 'runs/of a test' --adversary 'direct+all adam' --role immunized --seed 0"
    assert command in page(audit=make_audit()).text
    assert "cannot be replayed" in page(kind="audit", audit=make_audit()).text
    assert command in page(kind="audit", audit=make_audit(), recipe={"source": {"model": "a"}}).text


def test_a_long_battery_stays_readable() -> None:
    names = tuple(f"adversary {i:02d}" for i in range(40))
    audit = make_audit(names=names)
    audit = audit.model_copy(update={"adversaries": dict(reversed(audit.adversaries.items()))})
    seen = page(audit=audit)
    panels = [attrs for attrs in seen.all("div") if "data-small" in attrs and "adversary" in (attrs["id"] or "")]
    assert len(panels) == 40
    assert "The other 32 adversaries" in seen.text
    assert "adversary 00" in (panels[0]["aria-label"] or ""), "the strongest comes first"
    assert "adversary 39" in (panels[-1]["aria-label"] or "")
    assert seen.text.count("Show all 40") == 3
    assert "Show all" not in page(audit=make_audit()).text


def test_structure_serves_readers_of_every_kind() -> None:
    seen = page(audit=make_audit(), immunization=make_immunization())
    assert seen.all("html")[0]["lang"] == "en"
    assert len(seen.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in seen.elements if re.fullmatch(r"h\d", tag)]
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    plots = [a for a in seen.all("div") if a.get("class") == "plot"]
    assert len(plots) == 7
    assert all(a.get("role") == "img" and a.get("aria-label") for a in plots)
    ids = [a["id"] for _, a in seen.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in seen.all("a")} <= {f"#{i}" for i in ids}


def test_the_file_is_written_whole_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "report.html"
    write_report(make_result(audit=make_audit("fails")), path)
    result = make_result(audit=make_audit("resists"))
    write_report(result, path)
    assert path.read_text() == render(result, path.parent)
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: the page is not seen in a browser")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    names = (NASTY, "a-name-without-any-space-that-is-far-too-long-for-the-screen-of-a-phone")
    audit = make_audit("partial", names=names, lost={(NASTY, "original"): 2})
    write_report(make_result(audit=audit, immunization=make_immunization(events=2)), path)
    return path


def visit(browser: str, path: Path, profile: Path) -> tuple[str, list[str]]:
    """Opens a page in a headless browser; returns the document in the end, and the errors of its console."""
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
        "--virtual-time-budget=8000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={profile}", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    errors = [line for line in console if re.search("error|uncaught|refused|violates", line, re.IGNORECASE)]
    return done.stdout, errors


def test_a_browser_draws_every_figure_without_an_error(browser: str, report: Path, tmp_path: Path) -> None:
    document, errors = visit(browser, report, tmp_path / "profile")
    assert errors == []
    plots = re.split(r'<div class="plot[^"]*" id="plot-', document)[1:]
    assert [p.split('"')[0] for p in plots] == [
        "best", "advantage", "adversary-0", "adversary-1", "side-benign", "side-transfer", "history",
    ]  # fmt: skip
    for plot in plots:
        drawn = plot.split("<script", 1)[0]
        assert "<svg" in drawn
        assert 'class="main-svg"' in drawn
        lines = re.findall(r'<path class="js-line"[^>]* d="M[^"]+L', drawn)
        assert len(lines) >= 2, plot[:80]
    assert "<script>alert" not in document


def test_hovering_and_toggling_work_and_names_stay_text(browser: str, report: Path, tmp_path: Path) -> None:
    act = """<script>
      const small = document.querySelector(".plot[data-small]");
      document.querySelector("input[data-role=original]").click();
      document.body.dataset.visible = small.data.map(t => t.visible === false ? "-" : "+").join("");
      Plotly.Fx.hover("plot-best", [{curveNumber: 0, pointNumber: 1}]);
    </script>"""
    path = tmp_path / "acted.html"
    path.write_text(report.read_text().replace("</html>", f"{act}</html>"))
    document, errors = visit(browser, path, tmp_path / "profile")
    assert errors == []
    assert 'data-visible="+-++"' in document
    label = re.search(r'<g class="hovertext".*?</g>', document, re.DOTALL)
    assert label, "no label is shown"
    shown = "".join(Page(label[0]).words)
    assert "immunized after 10 steps: 43.0% ± 1.0 (3 seeds)" in shown
    assert NASTY in shown
    assert not Page(document).all("img")


def test_what_is_folded_away_is_drawn_when_it_is_unfolded(browser: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(make_result(audit=make_audit(names=[f"adversary {i}" for i in range(14)])), path)
    act = """<script>
      const drawn = () => document.querySelectorAll(".panels .js-plotly-plot").length;
      const before = drawn();
      document.querySelectorAll("details").forEach(d => { d.open = true; });
      setTimeout(() => { document.body.dataset.drawn = before + " then " + drawn(); }, 300);
    </script>"""
    path.write_text(path.read_text().replace("</html>", f"{act}</html>"))
    document, errors = visit(browser, path, tmp_path / "profile")
    assert errors == []
    assert 'data-drawn="10 then 16"' in document, re.findall(r'data-drawn="[^"]*"', document)


def test_an_error_in_a_page_would_be_seen(browser: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text("<script>Plotly.newPlot('x')</script>")
    assert visit(browser, path, tmp_path / "profile")[1] != []


def test_nothing_sticks_out_on_a_phone(browser: str, report: Path, tmp_path: Path) -> None:
    # A headless browser may not make its window as narrow as a phone, but frames may be.
    faults = {"fine": "", "faulty": "<div style='width:600px'>too wide</div>"}
    for name, fault in faults.items():
        answer = f"parent.postMessage(['{name}', document.documentElement.scrollWidth], '*')"
        probe = f"<script>addEventListener('load', () => {answer})</script>"
        (tmp_path / f"{name}.html").write_text(report.read_text().replace("</main>", f"{fault}</main>{probe}"))
    frames = [f"<iframe src='{name}.html' style='width:390px;height:800px;border:0'></iframe>" for name in faults]
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><script>addEventListener('message', e => { document.body.dataset[e.data[0]] = e.data[1] })</script>"
        + "".join(frames)
    )
    document, errors = visit(browser, outer, tmp_path / "profile")
    widths = dict(re.findall(r'data-(fine|faulty)="(\d+)"', document))
    assert set(widths) == set(faults), "a page did not answer"
    assert int(widths["fine"]) <= 390 < int(widths["faulty"])
    assert errors == []


def test_failed_trials_are_told():
    """A model's code may raise when it is trained; that must not look like an attack that learned nothing."""
    whole = make_audit()
    curves = [
        c.model_copy(update={"failure": "RuntimeError: for inference only"}) if c.role == "immunized" else c
        for c in whole.curves
    ]
    text = page(audit=whole.model_copy(update={"curves": curves})).text
    assert f"{sum(c.role == 'immunized' for c in curves)} of {len(curves)} trials ended" in text
    assert "RuntimeError: for inference only" in text
    assert "trials ended" not in page(audit=whole).text


def test_pictures_stand_row_by_row_with_their_labels_as_text() -> None:
    broken = torch.rand(3, 1, 8, 8)
    broken[1] = torch.nan
    figure = draw(
        "Faces & more",
        {NASTY: torch.rand(3, 1, 8, 8), "SOPHON": broken},
        note="Noise <taken> away.",
        columns=["a", "b<", "c"],
    )
    shown = page(figures={"faces": figure}, kind="protocol")
    for words in ("Faces & more", "Noise <taken> away.", "b<", NASTY):
        assert words in shown.text
    images = shown.all("img")
    assert [str(image["src"]).partition(",")[0] for image in images] == ["data:image/png;base64"] * 2
    assert images[1]["alt"] == "Pictures of Faces & more: SOPHON."
    assert images[0]["alt"] == f"Pictures of Faces & more: {NASTY}."
    assert (images[0]["width"], images[0]["height"]) == ("292", "96")
    assert "image-rendering: pixelated" in shown.styles
    kept = make_result(figures={"faces": figure}, kind="protocol").model_dump_json()
    assert RunResult.model_validate_json(kept).figures == {"faces": figure}


class TestTradeOff:
    def result(self, *seeds: str, setting: dict[str, Any] | None = None, timing: dict[str, float] | None = None):
        own = {"setting": "S"} if setting is None else setting
        row = {**own, "model": "original", "seed": "", "advantage": Cell.of([0.3, 0.4])}
        made = [{**own, "model": "D <i>", "seed": s, "benign drop": Cell.of([0.02]), "advantage": Cell.of([0.1, 0.2])}
                for s in seeds]  # fmt: skip
        table = Table(title="Resistance and its price", rows=[row, *made], percent=True, standard_error=True)
        recipe = {"title": "A protocol", "settings": {"S": {}}}
        return make_result(kind="protocol", recipe=recipe, tables={"trade_off": table}, timing=timing or {})

    def test_points_lie_at_what_was_lost_and_what_is_left(self):
        ((title, plot),) = trade_off_plots(self.result("0", "1", timing={"immunize S: D <i>, seed 0": 90.0}))
        assert title == "Resistance and its price: S"
        original, left, right = json.loads(plot.json)["data"]
        assert original["x"] + original["y"] == pytest.approx([0.0, 35.0])
        assert left["x"] + left["y"] == pytest.approx([2.0, 2.0, 15.0, 15.0])
        assert right["x"] + right["y"] == pytest.approx([1.5, 15.0])  # minutes are known of one alone
        assert left["name"] == "D &lt;i&gt;"
        assert left["error_y"]["array"] == pytest.approx([5.0, 5.0])

    def test_of_a_single_setting_minutes_are_found_as_well(self):
        timing = {"immunize S: D <i>, seed 0": 120.0}
        ((title, plot),) = trade_off_plots(self.result("0", setting={}, timing=timing))
        assert title == "Resistance and its price"
        assert json.loads(plot.json)["data"][-1]["x"] == [2.0]

    def test_on_the_page(self):
        page = render(self.result("0"), FOLDER)
        assert "<h2>Resistance and its price: S</h2>" in page
        assert "plot-trade-off-0" in page

    def test_without_defenses_there_is_none(self):
        assert trade_off_plots(self.result()) == []
        assert trade_off_plots(make_result()) == []


class TestOfDenoisers:
    def page(self, **change: Any) -> str:
        audit = make_audit().model_copy(update={"unit": "skill", "chance": 0.0, "shots": 5, **change})
        return render(make_result(audit=audit), FOLDER)

    def test_it_speaks_of_images_and_of_a_linear_denoiser(self):
        text = _text_of(self.page())
        assert "337 images" in text
        assert "Skill is 1 minus the mean squared error" in text
        assert "points above a linear denoiser" in text
        assert "That alone makes scores uncertain." in text
        for word in ("labelled", "guessing", "chance", "a class", "test labels", "ccuracy", "near 50%", "probes"):
            assert word not in text.replace("first look at", ""), word

    def test_figures_end_at_0_and_say_so_where_a_score_is_below(self):
        audit = make_audit()
        low = [c.model_copy(update={"scores": [-4.0, *c.scores[1:]]}) for c in audit.curves]
        assert "Scores below 0% are cut off" in _text_of(self.page(curves=low))
        assert "cut off" not in _text_of(self.page())
        assert "cut off" not in _text_of(render(make_result(audit=audit), FOLDER))

    def test_it_says_where_scratch_has_not_learned_anything(self):
        rows = make_audit().by_budget
        low = [r.model_copy(update={"best": {**r.best, "scratch": Cell.of([-3.0] * 3)}}) for r in rows[:2]]
        said = f"After {rows[1].budget} steps training from scratch is still below 0%"
        assert said in _text_of(self.page(by_budget=[*low, *rows[2:]]))
        assert "is still below" not in _text_of(self.page())

    def test_a_defenses_record_is_of_errors(self):
        made = make_immunization()
        made = made.model_copy(update={"config": {**made.config, "loss": "dos"}})
        text = _text_of(render(make_result(immunization=made), FOLDER))
        assert "Held-out benign error, last look 0.9700" in text
        assert "benign score" not in text


def _text_of(page: str) -> str:
    bare = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


@pytest.mark.parametrize(("columns", "whole"), [("400", True), ("60", False)])
def test_a_terminal_table_never_loses_a_number(columns, whole, monkeypatch, capsys):
    """Rich would cut columns to nothing; spreads are left out first, and then the lines get longer."""
    monkeypatch.setenv("COLUMNS", columns)
    means = [0.476612, 0.0847, 0.0663, 0.0978, 1.0371]
    cells = {f"epoch {i}": Cell.of([mean - 0.012345, mean + 0.012345]) for i, mean in enumerate(means)}
    table = Table(title="Errors", rows=[{"model": "scratch", "attack": "direct+all", **cells}], percent=False)
    show(make_result(kind="protocol", tables={"error": table}), FOLDER)
    shown = capsys.readouterr().out
    assert all(f"{mean:.4g}" in shown for mean in means)
    assert "direct+all" in shown
    assert ("± 0.017" in shown) is whole
    assert ("spreads are in the report" in shown) is not whole
