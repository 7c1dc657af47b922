"""Studies: every table, figure and sentence from what was measured; resumable; the recipes at smoke scale."""

from __future__ import annotations

import json
import math

import pytest
import torch

from holdfast.defenses import FrontierDefense, LinearProblem
from holdfast.errors import HoldfastError
from holdfast.experiments.linear.study import StudySpec, measure, sources, study
from holdfast.experiments.recipe import StudyRecipe, load
from holdfast.experiments.runner import run_recipe
from holdfast.models import features
from holdfast.results import read_result
from holdfast.results.tables import Cell, Map
from holdfast.runtime.documents import read_yaml, recipe_names, recipe_text
from holdfast.runtime.run import Run
from holdfast.spectral.rir import published_kappa
from holdfast.tasks import load_task

CPU = torch.device("cpu")
BASE = {
    "tau_steps": 5,
    "tables": {
        "digits": {
            "title": "Digits",
            "pair": {"benign": {"data": "digits[0-4]"}, "restricted": {"data": "digits[5-9]"}},
        }
    },
    "methods": {"best": {"name": "frontier"}, "first": {"name": "condition", "iterations": 5}},
}
STUDIES = [name for name in recipe_names() if read_yaml(recipe_text(name), name).get("kind") == "study"]
PAIRS = {"digits": {"title": "Pairs", "class_pairs": {"data": {"data": "digits[0-3]"}}, "space": "ridge", "ridge": 0.5}}


def run_study(settings, run=None, **changes):
    recipe = StudyRecipe.model_validate({"kind": "study", "title": "A study", **BASE, **settings, **changes})
    tasks = {name: [load_task(s) for s in specs] for name, specs in sources(recipe)}
    return study(recipe, recipe.build_methods(), tasks, None, run=run or Run(0, CPU))


def test_tables_say_what_the_mathematics_says():
    outcome = run_study({})
    rows = {row["method"]: row for row in outcome.tables["digits"].rows}
    assert list(rows) == ["identity", "best", "first"]
    assert rows["identity"]["rir"].mean == pytest.approx(1)
    best = rows["best"]
    assert best["rir"].mean == pytest.approx(best["rir_bound"].mean, rel=1e-6)
    assert best["immunized"].mean == 1
    assert rows["first"]["rir"].mean <= best["rir_bound"].mean
    assert "best (100.0% of RIR*)" in outcome.findings[0]


def test_the_same_as_by_hand():
    outcome = run_study({})
    pair = [features(None, load_task(d), "train") for d in ("digits[0-4]", "digits[5-9]")]
    problem = LinearProblem.of(*pair)
    theta, _ = FrontierDefense().extractor(problem, run=Run(0, CPU))
    raw = pair[0][0], pair[1][0]
    spec = StudySpec.model_validate(BASE)
    values = measure(problem.frontier, theta, raw, spec)
    assert values == measure(
        problem.frontier, theta, raw, spec, before=(published_kappa(raw[0]), published_kappa(raw[1]))
    )
    row = next(r for r in outcome.tables["digits"].rows if r["method"] == "best")
    assert row["ratio_restricted"].mean == values["ratio_restricted"]
    published = next(r for r in outcome.tables["digits_published"].rows if r["method"] == "best")
    assert published["published_rir"].mean == values["published_rir"]
    convergence = next(r for r in outcome.tables["digits_convergence"].rows if r["method"] == "best")
    assert convergence["tau_restricted"].mean == values["tau_restricted"]


def test_all_ordered_pairs_of_classes_and_their_map():
    outcome = run_study({"tables": PAIRS})
    figure = outcome.figures["digits_map"]
    assert isinstance(figure, Map)
    assert figure.rows == figure.columns == ["0", "1", "2", "3"]
    grid = figure.panels["best"]
    assert all((grid[i][j] is None) == (i == j) for i in range(4) for j in range(4))
    assert all(v > 0 for row in grid for v in row if v is not None)
    assert "best: 12 of 12 pairs" in outcome.findings[0]
    mean = sum(10**v for row in grid for v in row if v is not None) / 12
    rows = {row["method"]: row for row in outcome.tables["digits"].rows}
    assert rows["best"]["rir"].mean == pytest.approx(mean)


def test_seeds_give_a_deviation_only_where_something_is_random():
    methods = {
        "best": {"name": "frontier"},
        "random": {"name": "condition", "iterations": 5, "initialisation": "random"},
    }
    outcome = run_study({"methods": methods, "seeds": 3})
    rows = {row["method"]: row for row in outcome.tables["digits"].rows}
    assert rows["best"]["rir"].n == rows["random"]["rir"].n == 3
    assert rows["best"]["rir"].sd == 0
    assert rows["random"]["rir"].sd > 0


def test_the_papers_numbers_stand_beside_ours():
    paper = {"best": {"rir": 12.5}}
    tables = {"digits": {**BASE["tables"]["digits"], "paper": paper}}
    row = next(r for r in run_study({"tables": tables}).tables["digits"].rows if r["method"] == "best")
    assert row["rir"].paper == 12.5
    assert row["ratio_benign"].paper is None


def test_norm_ratio_curves_and_held_out_ratios():
    tables = {"digits": {**BASE["tables"]["digits"], "held_out": True}}
    outcome = run_study({"tables": tables, "norm_ratio_steps": 4})
    curves = outcome.figures["digits_norm_ratios_restricted"].series
    assert set(curves) == {"identity", "best", "first"}
    assert all(len(c) == 5 and c[0] == pytest.approx(1) for c in curves.values())
    assert {"digits_norm_ratios_benign", "digits_published_norm_ratios_restricted"} <= set(outcome.figures)
    held_out = outcome.tables["digits"].rows[1]["held_out_ratio_restricted"]
    assert isinstance(held_out, Cell)
    assert held_out.mean > 1


def test_what_did_not_converge_in_time_is_none_not_a_number():
    rows = {r["method"]: r for r in run_study({"tau_steps": 1}).tables["digits_convergence"].rows}
    assert rows["best"]["tau_restricted"].mean > 1
    assert rows["best"]["tau_restricted_measured"].mean is None


def test_predicted_and_measured_steps_agree():
    rows = run_study({"tau_steps": 10**5, "tau_q": 0.7}).tables["digits_convergence"].rows
    for row in rows:
        for task in ("restricted", "benign"):
            measured = row[f"tau_{task}_measured"].mean
            assert measured is not None
            assert row[f"tau_{task}"].mean == pytest.approx(measured, rel=0.1, abs=1)


def test_probes_are_scored_behind_every_method():
    tables = {"digits": {**BASE["tables"]["digits"], "held_out": True}}
    probes = {"budgets": [1, 3], "benign": ["probe line-search raw"]}
    methods = {"signal": {"name": "signal-frontier"}}
    table = run_study({"tables": tables, "probes": probes, "methods": methods}).tables["digits_probes"]
    assert table.percent
    rows = {(r["model"], r["method"]): r for r in table.rows}
    assert len(rows) == 2 * (18 + 1)
    closed = [rows["restricted: probe ridge whitened", m]["step 1"].mean for m in ("identity", "signal")]
    assert closed[0] == pytest.approx(closed[1], abs=0.02)  # whitening walks through any linear extractor
    assert rows["benign: probe line-search raw", "signal"]["step 1"].mean > 0.9
    slow = [rows["restricted: probe gd raw", m]["step 3"].mean for m in ("identity", "signal")]
    assert all(0 <= s <= 1 for s in slow)


class TestResume:
    def test_what_is_kept_is_not_measured_again(self, tmp_path, monkeypatch):
        whole = run_study({"tables": PAIRS})
        folder = Run(0, CPU, tmp_path)
        calls = []
        original = FrontierDefense.extractor

        def killed(self, problem, *, run):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return original(self, problem, run=run)

        monkeypatch.setattr(FrontierDefense, "extractor", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study({"tables": PAIRS}, run=folder)
        again = run_study({"tables": PAIRS}, run=folder)
        assert len(calls) == 5 + 8
        assert again == whole

    def test_another_study_is_refused(self, tmp_path):
        run_study({}, run=Run(0, CPU, tmp_path))
        with pytest.raises(HoldfastError, match="holds an unfinished study with another methods"):
            run_study({"methods": {"best": {"name": "frontier", "stretch": 0.5}}}, run=Run(0, CPU, tmp_path))

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda entry: {**entry, "rir": "many"}, "rir is 'many', not a number"),
            (lambda entry: {**entry, "rir": True}, "rir is True, not a number"),
            (lambda entry: {k: v for k, v in entry.items() if k != "rir"}, "lacks or adds ..rir"),
            (lambda entry: {**entry, "more": 1}, "lacks or adds ..more"),
            (lambda entry: {**entry, "norm_ratios_benign": [1]}, "norm_ratios_benign is not a list of 3 numbers"),
            (lambda entry: 3, "not iterable"),
        ],
    )
    def test_a_damaged_or_foreign_entry_is_one_message_before_any_work(self, tmp_path, monkeypatch, damage, message):
        run_study({"norm_ratio_steps": 2}, run=Run(0, CPU, tmp_path))
        path = tmp_path / "checkpoints" / "study.jsonl"
        head, *lines = path.read_text().splitlines()
        entry = json.loads(lines[0])
        entry["value"] = damage(entry["value"])
        path.write_text("\n".join([head, json.dumps(entry)]) + "\n")
        monkeypatch.setattr(
            "holdfast.experiments.linear.study.measure", lambda *_, **__: pytest.fail("work was done before")
        )
        with pytest.raises(HoldfastError, match=f"study.jsonl' is damaged .*{message}.*delete the line"):
            run_study({"norm_ratio_steps": 2}, run=Run(0, CPU, tmp_path))

    def test_a_damaged_probe(self, tmp_path):
        tables = {"digits": {**BASE["tables"]["digits"], "held_out": True}}
        settings = {"tables": tables, "probes": {"budgets": [1]}, "methods": {"best": {"name": "frontier"}}}
        run_study(settings, run=Run(0, CPU, tmp_path))
        path = tmp_path / "checkpoints" / "study.jsonl"
        path.write_text(path.read_text().replace('"value": [0', '"value": ["a", 0', 1))
        with pytest.raises(HoldfastError, match=r"probe.*not a list of 1 scores"):
            run_study(settings, run=Run(0, CPU, tmp_path))

    def test_progress_counts_pieces_whatever_their_names_are(self, tmp_path, monkeypatch):
        methods = {"a/b": {"name": "frontier"}, "c": {"name": "frontier", "stretch": 0}}
        tables = {"x/y": BASE["tables"]["digits"]}
        run_study({"tables": tables, "methods": methods}, run=Run(0, CPU, tmp_path))
        path = tmp_path / "checkpoints" / "study.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))  # the identity and a/b
        seen = []
        progress = Run.progress
        monkeypatch.setattr(Run, "progress", lambda self, *args: seen.append(args) or progress(self, *args))
        run_study({"tables": tables, "methods": methods}, run=Run(0, CPU, tmp_path))
        assert seen == [("Measuring", 3, 2)]


class TestRecipe:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": {"x": {"name": "sophon"}}}, "compares linear extractors, and sophon is not one"),
            ({"methods": {"x": {"name": "frontier", "strech": 1}}}, "did you mean 'stretch'"),
            ({"tables": {"a": {"title": "t"}}}, "give either `pair` or `class_pairs`"),
            ({"tables": {"a": {**PAIRS["digits"], "held_out": True}}}, "held_out needs a `pair`"),
            ({"seeds": 0}, "seeds is 0"),
            ({"tauq": 0.5}, "did you mean 'tau_q'"),
        ],
    )
    def test_mistakes_are_named(self, changes, message, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({"kind": "study", "title": "Mine", **BASE, **changes}))
        with pytest.raises(HoldfastError, match=message):
            load(str(path))

    def test_runs_from_the_file_to_the_report_and_knows_when_it_is_done(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({"kind": "study", "title": "Mine", "about": "What it is about.", **BASE}))
        folder = tmp_path / "out"
        first = run_recipe(load(str(path)), folder=folder, device="cpu", quiet=True)
        assert read_result(folder).numbers() == first.numbers()
        assert first.job == "study"
        again = run_recipe(load(str(path)), folder=folder, device="cpu", quiet=True)
        assert again.provenance == first.provenance
        page = (folder / "report.html").read_text()
        assert "RIR*" in page
        assert '<p class="quiet">What it is about.</p>' in page
        assert first.recipe["tau_steps"] == 5

    def test_a_recipe_that_was_recorded_one_level_too_deep_is_read(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({"kind": "study", "title": "Mine", "about": "Old.", **BASE}))
        result = run_recipe(load(str(path)), folder=tmp_path / "out", device="cpu", quiet=True)
        stored = json.loads((tmp_path / "out" / "result.json").read_text())
        stored["recipe"] = {"recipe": stored["recipe"], "model": None}
        (tmp_path / "out" / "result.json").write_text(json.dumps(stored))
        assert read_result(tmp_path / "out").numbers() == result.numbers()

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_recipe_runs_at_smoke_scale(self, name, data_dir, tmp_path):
        result = run_recipe(
            load(name, scale="smoke"), folder=tmp_path / "r", data_dir=data_dir, device="cpu", quiet=True
        )
        for table in result.tables.values():
            assert table.rows
        main = next(iter(result.tables.values())).rows
        assert {"rir", "ratio_restricted", "ratio_benign", "rir_bound"} <= set(main[0])
        for row in main:
            assert row["rir"].mean is not None
            assert math.isfinite(row["rir"].mean)

    @pytest.mark.parametrize("name", STUDIES)
    def test_every_recipe_has_its_scales(self, name):
        assert isinstance(load(name, scale="cpu"), StudyRecipe)
        assert isinstance(load(name, scale="paper"), StudyRecipe)


def test_the_papers_scale_takes_a_step(data_dir):
    """All 784 pixels, of two digits; one step of Algorithm 1."""
    methods = "methods={algorithm-1: {name: condition, iterations: 1, more_multiples: []}, frontier: {name: frontier}}"
    digits = 'tables.pairs.class_pairs.data={data: "mnist[0-1]", train_limit: 400}'
    recipe = load("condition/mnist-pairs", scale="paper", overrides=[digits, methods, "seeds=1"])
    tasks = {name: [load_task(s, data_dir=data_dir) for s in specs] for name, specs in sources(recipe)}
    outcome = study(recipe, recipe.build_methods(), tasks, None, run=Run(0, CPU))
    rows = {row["method"]: row for row in outcome.tables["pairs"].rows}
    assert tasks["pairs"][0].input_shape == (1, 28, 28)
    assert rows["algorithm-1"]["rir"].mean is not None
    assert rows["frontier"]["rir"].mean >= 0.999 * rows["frontier"]["rir_bound"].mean


def test_all_90_mnist_pairs_reach_the_bound(data_dir):
    """The frontier's tables of MNIST: every pair immunized, by the definition and up to rounding at the bound."""
    overrides = ["methods={frontier: {name: frontier}}", "tau_q=0.5", "tables.pairs.class_pairs.data.train_limit=4000"]
    recipe = load("condition/mnist-pairs", overrides=overrides)
    tasks = {name: [load_task(s, data_dir=data_dir) for s in specs] for name, specs in sources(recipe)}
    outcome = study(recipe, recipe.build_methods(), tasks, None, run=Run(0, CPU))
    assert outcome.findings == [
        "frontier: 90 of 90 pairs have (i) above 1 and (ii) at most 1 in every seed; 90 have RIR above 1."
    ]
    row = outcome.tables["pairs"].rows[1]
    assert row["rir"].mean >= 0.999 * row["rir_bound"].mean
    assert row["ratio_benign"].mean <= 1.001
