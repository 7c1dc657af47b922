"""The leaderboard: what compares, what is unreliable, and what could not be read."""

from __future__ import annotations

import re

import pytest
from test_report import Page, browser, visit

from holdfast.errors import HoldfastError
from holdfast.report.leaderboard import collect, write_leaderboard
from holdfast.results.tables import Cell
from made_results import FLAGS, NASTY, make_audit, make_immunization, make_result

assert browser  # the fixture


def put(folder, name, audit, **parts):
    (folder / name).mkdir(parents=True)
    result = make_result(audit=audit, **parts)
    (folder / name / "result.json").write_text(result.model_dump_json())


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, "good", make_audit("resists"), title="A good one", immunization=make_immunization())
    put(tmp_path, "deep/er", make_audit("fails", flags=FLAGS), title="Flagged")
    other = make_audit("partial").model_copy(update={"restricted_task": "faces"})
    put(tmp_path, "other", other, title=NASTY)
    put(tmp_path, "made", None, kind="immunize", immunization=make_immunization())
    for name, content in (("torn", "{"), ("foreign", '{"a": 1}'), ("binary", "\x00")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(content)
    return tmp_path


def page(folder):
    path = folder / "leaderboard.html"
    write_leaderboard(collect(folder), path)
    return path.read_text()


def test_only_what_compares_shares_a_table(folder):
    board = collect(folder)
    assert [[e.where for e in entries] for _, entries in board.groups] == [["good", "deep/er"], ["other"]]
    assert board.others == [("made", "immunize")]
    assert [where for where, _ in board.damaged] == ["binary", "foreign", "torn"]
    seen = Page(page(folder))
    assert len(seen.all("table")) == 2
    assert "torn" in seen.text
    assert "is damaged or of another version" in seen.text
    assert not seen.all("img")
    assert " ".join(NASTY.split()) in seen.text


def test_a_row_shows_the_numbers(folder):
    rows = re.findall(r"<tr class=\"tone-.*?</tr>", page(folder), re.DOTALL)
    cells = [" ".join(" ".join(Page(c).words).split()) for c in re.findall(r"<t[dh].*?</t[dh]>", rows[0], re.DOTALL)]
    assert cells == [
        "A good one good", "Resists", "yes", "13% (4% to 25%)", "+3.0 (+3.0 to +3.0)", "+2.7", "+20.0", "0.94 ×",
        "62.0% (52% to 72%)", "", "none", "sophon cnn", "test-v1 2 adversaries, 3 seeds",
    ]  # fmt: skip


def reasons(tmp_path, audit, **parts):
    put(tmp_path, "one", audit, **parts)
    return collect(tmp_path).entries[0].unreliable


@pytest.mark.parametrize(
    ("audit", "reason"),
    [
        (make_audit("invalid"), "the audit is invalid"),
        (make_audit("fails", flags=FLAGS), "critical red flag: Poisoned BatchNorm statistics"),
        (make_audit("fails", flags=FLAGS[1:]), None),
        (make_audit().model_copy(update={"battery": "quick-v1"}), "battery quick-v1 only"),
        (make_audit().model_copy(update={"battery": "standard-v1"}), None),
        (make_audit(seeds=2), "2 seeds only"),
        (make_audit(seeds=1), "one seed"),
        (make_audit().model_copy(update={"reported": 0.23}), "reported 23.0%, but measured"),
        (make_audit().model_copy(update={"reported": 0.6}), None),
    ],
)
def test_unreliable_has_a_reason(tmp_path, audit, reason):
    found = reasons(tmp_path, audit)
    assert any(r.startswith(reason) for r in found) if reason else found == []


def test_the_papers_number_is_reported_where_no_one_else_does(tmp_path):
    audit = make_audit()
    last = audit.by_budget[-1]
    cell = Cell(mean=0.62, sd=0.01, n=3, paper=0.2)
    rows = [*audit.by_budget[:-1], last.model_copy(update={"best": {**last.best, "immunized": cell}})]
    put(tmp_path, "paper", audit.model_copy(update={"by_budget": rows}))
    put(tmp_path, "both", audit.model_copy(update={"by_budget": rows, "reported": 0.3}))
    assert {e.where: e.reported for e in collect(tmp_path).entries} == {"both": 0.3, "paper": 0.2}


def test_nothing_to_render_is_an_error(tmp_path):
    with pytest.raises(HoldfastError, match=r"no result\.json under"):
        collect(tmp_path)


def test_a_browser_sorts_and_nothing_sticks_out_on_a_phone(browser, folder, tmp_path):
    act = """<script>
      const order = () => [...document.querySelectorAll("table.board tbody")][0].innerText.match(/A good one|Flagged/g);
      const click = i => document.querySelectorAll("table.board thead button")[i].click();
      click(1); const first = order(); click(1); const second = order();
      addEventListener("load", () => parent.postMessage(
        [first, second, document.documentElement.scrollWidth].join(), "*"));
    </script>"""
    (tmp_path / "inner.html").write_text(page(folder).replace("</html>", f"{act}</html>"))
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><script>addEventListener('message', e => { document.body.dataset.seen = e.data })</script>"
        "<iframe src='inner.html' style='width:390px;height:800px;border:0'></iframe>"
    )
    document, errors = visit(browser, outer, tmp_path / "profile")
    assert errors == []
    first, second, third, fourth, width = re.search(r'data-seen="([^"]*)"', document)[1].split(",")
    assert (first, second) == ("Flagged", "A good one"), "fails before resists"
    assert (third, fourth) == ("A good one", "Flagged")
    assert int(width) <= 390
