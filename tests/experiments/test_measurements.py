"""A protocol's condition numbers, probe curves and side effects: Table 3 and Figure 3 of the ICML 2025 paper."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics

import numpy as np
import pytest
import torch

from holdfast.adversaries import FineTuning, Probe
from holdfast.auditing.trials import few_of
from holdfast.errors import HoldfastError
from holdfast.experiments.immunization import ImmunizedModel
from holdfast.experiments.measurements.attack_curves import Attack
from holdfast.experiments.measurements.condition_numbers import Conditioning, lay_out
from holdfast.experiments.measurements.probe_curves import effect, probe_outcome
from holdfast.experiments.measurements.transfer import transfer_attacks
from holdfast.experiments.recipe import ProtocolRecipe, load
from holdfast.experiments.runner import run_recipe
from holdfast.experiments.setting_scores import Measure, PaperSpec, Row, SettingScores
from holdfast.metrics.rir import GroupSpectra, relative_conditioning
from holdfast.models import load_model
from holdfast.results import Curve, ImmunizationResult, read_result
from holdfast.runtime.run import Run
from holdfast.tasks import load_task
from holdfast.tasks.splits import halves
from holdfast.training import Strategy

BASE = {
    "kind": "protocol",
    "title": "A protocol",
    "threads": 1,
    "seeds": 1,
    "epochs": [0, 1, 10],
    "shots": 20,
    "battery": "probes-v1",
    "conditioning": {"groups": 3, "samples": 80},
    "settings": {
        "digits": {
            "model": {"name": "cnn", "options": {"width": 4, "hidden": 16}},
            "pretrain": {"steps": 60},
            "benign": {"data": "digits[0-4]"},
            "restricted": {"data": "digits[5-7]"},
            "transfer": {"data": "digits[8,9]"},
        }
    },
    "defenses": {"frontier": {"name": "frontier"}, "ours": {"name": "condition", "iterations": 20},
                 "LEACE": {"name": "leace"}},
    "paper": {"digits": {"ours": {"benign": [62.36, 0.173], "ratio_restricted": [2.386, 0.442], "rir": 3.467}}},
}  # fmt: skip


SETTING = BASE["settings"]["digits"]


def recipe(**changes):
    return ProtocolRecipe.model_validate({**BASE, **changes})


def run(folder, chosen=None, **more):
    return run_recipe(chosen or recipe(), folder=folder, device="cpu", quiet=True, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("deep") / "whole"
    run(made)
    return made


@pytest.fixture(scope="module")
def result(folder):
    return read_result(folder)


class TestSchema:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"conditioning": {"groups": 0}}, "conditioning.groups is 0"),
            ({"conditioning": {"group": 3}}, "did you mean 'conditioning.groups'"),
            ({"defenses": {}}, "there are no defenses"),
            ({"transfer_attacks": ["probe rigde raw"]}, "did you mean 'probe ridge raw'"),
            ({"paper": {"digits": {"ours": {"ratio": 1.0}}}}, "ratio"),
            (
                {
                    "settings": {"x": {**SETTING, "transfer": None}},
                    "transfer_attacks": ["probe gd raw"],
                },
                "no setting has a transfer task",
            ),
        ],
    )
    def test_mistakes_are_named(self, changes, message, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({**BASE, **changes}))
        with pytest.raises(HoldfastError, match=message):
            load(str(path))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"conditioning": {"samples": 5000}}, r"conditioning, in setting 'digits': .* 5000 samples"),
            ({"settings": {"x": {**SETTING, "transfer": {"data": "digitz"}}}}, "mean 'digits'"),
            (
                {"settings": {"x": {**SETTING, "transfer": {"data": "diabetes"}}}},
                "diabetes|transfer",
            ),
        ],
    )
    def test_what_does_not_fit_costs_nothing(self, changes, message, tmp_path):
        with pytest.raises(HoldfastError, match=message):
            run(tmp_path / "new", recipe(**changes))
        assert not (tmp_path / "new").exists()


class TestTable3:
    def test_the_numbers_are_those_of_the_function(self, folder, result):
        benign, restricted = load_task("digits[0-4]"), load_task("digits[5-7]")
        models = {}
        for path in (folder / "checkpoints" / "immunized").glob("*.json"):
            weights = str(path.with_suffix(".safetensors"))
            models[json.loads(path.read_text())["made_of"]["defense"]] = load_model(weights, benign)
        (weights,) = (folder / "checkpoints" / "originals").glob("*.safetensors")
        original = load_model(str(weights), benign)
        table = {row["model"]: row for row in result.tables["conditioning"].rows}
        assert list(table) == ["original", "frontier", "ours", "LEACE"]
        for label, name in (("frontier", "frontier"), ("ours", "condition"), ("LEACE", "leace")):
            found = relative_conditioning(
                original, models[name], benign, halves(restricted)[1], groups=3, samples=80, seed=0
            )
            for column, values in (
                ("ratio_restricted", found.restricted), ("ratio_benign", found.benign), ("rir", found.rir),
            ):  # fmt: skip
                cell = table[label][column]
                assert cell.mean == pytest.approx(statistics.fmean(values), rel=1e-6)
                assert cell.n == 3
        assert [table["original"][c].mean for c in ("ratio_restricted", "ratio_benign", "rir")] == [1, 1, 1]

    def test_the_papers_numbers_and_benign_accuracy_stand_beside(self, result):
        table = {row["model"]: row for row in result.tables["conditioning"].rows}
        ours = table["ours"]
        assert (ours["ratio_restricted"].paper, ours["ratio_restricted"].paper_sd) == (2.386, 0.442)
        assert (ours["rir"].paper, ours["rir"].paper_sd, ours["ratio_benign"].paper) == (3.467, None, None)
        assert ours["benign_percent"].paper == pytest.approx(62.36)
        accuracy = {row["model"]: row["benign"] for row in result.tables["accuracy"].rows}
        for model in table:
            assert table[model]["benign_percent"].mean == pytest.approx(100 * accuracy[model].mean)

    def test_an_eraser_changes_the_rank_and_it_is_said(self, result):
        table = {row["model"]: row for row in result.tables["conditioning"].rows}
        assert "restricted" in table["LEACE"]["other rank"]
        assert "other rank" not in table["ours"]
        (text,) = (f for f in result.findings if f.startswith("LEACE: RIR"))
        assert "are not comparable" in text

    def test_in_words(self):
        spectra = {
            ("x", model, seed): GroupSpectra(
                benign=(10.0, 10.0), restricted=values, benign_ranks=(4, 4), restricted_ranks=(4, 4), bounds=(9.0, None)
            )
            for model, seed, values in (
                ("original", 0, (5.0, 5.0)), ("closed", 0, (50.0, 30.0)), ("A", 0, (20.0, 4.0)), ("A", 1, (20.0, 20.0)),
                ("B", 0, (None, 5.0)),
            )
        }  # fmt: skip
        names = {("closed", 0): "frontier", ("A", 0): "condition", ("A", 1): "condition", ("B", 0): "ntl"}
        outcome = lay_out(Conditioning(groups=2), [scene(made={k: made(v) for k, v in names.items()})], spectra)
        closed, a, b = outcome.findings
        assert closed.startswith(
            "closed: RIR is 8 ± 2.8, from (i) 8 ± 2.8 and (ii) 1 ± 0; (i) is above 1; (ii) at most 1"
        )
        assert "together in 2 of 2 groups" in closed
        assert "together in 3 of 4 groups. That is less than the 8 of closed" in a
        assert b == "B: RIR is not defined, because features are not finite or all zero in some groups."
        table = {row["model"]: row for row in outcome.tables["conditioning"].rows}
        assert table["A"]["ratio_restricted"].n == 4
        assert table["A"]["ratio_restricted"].mean == pytest.approx((4 + 0.8 + 4 + 4) / 4)
        assert table["original"]["rir_bound"].mean is None  # of one group it is not known
        assert "2 groups of each of 2 immunizations" in outcome.tables["conditioning"].note


def scene(**changes):
    defaults = {
        "name": "x", "restricted": "r", "measure": Measure("accuracy"),
        "benign_measure": Measure("accuracy"), "chance": 0.1, "original": 0.95, "made": {}, "paper": {},
        "stands_for": None,
    }  # fmt: skip
    return SettingScores(**{**defaults, **changes})


def made(defense="sophon"):
    return ImmunizedModel(
        None, ImmunizationResult(defense=defense, config={}, history={}, events=[], completed=True), 0.9, 1, None
    )


class TestFigure3:
    def outcome(self, ours, defense="condition", whitened=None, other=None):
        probes = (Probe("gd"), Probe("adam", "whitened", 0.1), Probe("ridge"), Probe("line-search", "whitened"))
        plan = [Attack(p.name, p, (0, 1, 10, 100), p.name) for p in probes]
        plan.append(Attack("fine-tuning", FineTuning(Strategy("head")), (0, 1, 10, 100), "fine-tuning"))
        scores = {"original": (0.1, 0.3, 0.5, 0.6), "ours": ours} | ({"other": other} if other else {})
        rows = [
            Row("x", model, a.label, (a.label,), (a.label,), a.epochs, 1, curves=(
                curve(a.label, whitened if whitened and model == "ours" and "whitened" in a.label else values),))
            for a, (model, values) in itertools.product(plan, scores.items())
        ]  # fmt: skip
        everyone = {("ours", 0): made(defense)} | ({("other", 0): made("leace")} if other else {})
        return probe_outcome(plan, [scene(made=everyone)], {"x": rows})

    @pytest.mark.parametrize(
        ("ours", "text"),
        [
            ((0.1, 0.3, 0.5, 0.5), "still lower at the end than on the original:"),
            ((0.1, 0.2, 0.5, 0.6), "slower at first, and as good in the end:"),
            ((0.0, 0.29, 0.48, 0.58), "not slowed:"),
            ((0.1, 0.3, None, 0.6), "without a finite score:"),
        ],
    )
    def test_which_probes_are_slowed(self, ours, text):
        assert f"Linear probes on ours: {text} every one." in self.outcome(ours).findings[0]
        other = (0.1, 0.3, 0.5, 0.5) if "at the end" not in text else (0.1, 0.3, 0.5, 0.6)
        assert f"{text} gd (raw), ridge (raw)" in self.outcome(ours, whitened=other).findings[0]

    def test_whose_curve_is_lowest(self):
        lower, higher, lowest = (0.1, 0.3, 0.5, 0.5), (0.1, 0.3, 0.5, 0.7), (0.1, 0.1, 0.1, 0.1)
        assert self.outcome(lower).findings[1] == (
            "After the last epoch of probe gd raw, slowest first: ours 50.0%, original 60.0%. Of the paper's methods "
            "Algorithm 1 is the slowest, as in its Figure 3."
        )
        assert "The most: probe gd raw, 50.0% against 60.0% after step 100." in self.outcome(lower).findings[0]
        assert "the slowest of its methods; here original is." in self.outcome(higher).findings[1]
        assert "as in its Figure 3" in self.outcome(lower, "deep-condition").findings[1]
        assert "Figure 3" not in self.outcome(lower, "sophon").findings[1]
        assert "as in its Figure 3" in self.outcome(lower, other=lowest).findings[2], "LEACE is none of the paper's"

    def test_figures_are_over_steps_and_of_iterative_probes(self):
        outcome = self.outcome((0.1, 0.2, 0.3, 0.4))
        assert [f.title for f in outcome.figures.values()] == [
            "Probe gd raw, step by step", "Probe adam 0.1 whitened, step by step",
        ]  # fmt: skip
        figure = outcome.figures["probe_0"]
        assert (figure.log_x, figure.x) == (True, [1, 10, 100])
        assert figure.series == {"original": [0.3, 0.5, 0.6], "ours": [0.2, 0.3, 0.4]}
        rows = {row["probe"]: row for row in outcome.tables["probes"].rows}
        assert list(rows) == [p for p in rows if p.startswith("probe")]
        assert rows["probe ridge raw"]["ours"].mean == 0.4

    def test_of_a_whole_protocol(self, result, folder):
        assert len(result.tables["probes"].rows) == 18
        titles = [f.title for f in result.figures.values()]
        assert titles[0] == "Probe line-search raw, step by step"
        assert sum("raw" in t for t in titles) == 5
        assert sum("whitened" in t for t in titles) == sum("standardised" in t for t in titles) == 1
        assert "An epoch has 1 step." in result.tables["accuracy"].note
        by_attack = {(r["model"], r["attack"]): r for r in result.tables["accuracy"].rows}
        row = next(r for r in result.tables["probes"].rows if r["probe"] == "probe gd raw")
        assert row["ours"] == by_attack["ours", "probe gd raw"]["epoch 10"]
        page = (folder / "report.html").read_text()
        assert "RIR of deep features" in page
        assert "step by step" in page

    def test_without_probes_there_is_nothing(self):
        plan = [Attack("a", FineTuning(Strategy("head")), (0, 1), "a")]
        outcome = probe_outcome(plan, [scene()], {"x": []})
        assert (outcome.tables, outcome.figures, outcome.findings) == ({}, {}, [])

    def test_a_score_that_is_not_finite_is_no_effect(self):
        rows = [
            Row("x", "m", "a", ("a",), ("a",), (0, 1), 1, curves=(curve("a", values),))
            for values in ((0.1, None), (0.1, 0.5))
        ]
        assert effect(rows[0], rows[1]) is None


def curve(attack, scores):
    return Curve(
        adversary=attack, role="original", seed=0, budgets=[0, 1, 10, 100][: len(scores)], scores=list(scores),
        losses=[None] * len(scores), folds=[None] * len(scores), batch_size=5,
    )  # fmt: skip


class TestSideEffects:
    def test_who_learns(self):
        plan = recipe().plan()
        assert [a.label for a in transfer_attacks(plan, ())] == [
            f"probe ridge {p}" for p in ("raw", "standardised", "whitened")
        ]
        assert [a.label for a in transfer_attacks(plan, ("probe gd raw",))] == ["probe gd raw"]
        heads = recipe(battery=None, attacks={"A": {}, "B": {"scope": "head", "initialisation": "head"}}).plan()
        assert [a.label for a in transfer_attacks(heads, ())] == ["B"]
        assert [a.label for a in transfer_attacks(heads[:1], ())] == ["probe ridge raw"]

    def test_the_numbers_are_those_of_the_attack_itself(self, result, folder):
        rows = {(r["model"], r["attack"]): r for r in result.tables["side_effects"].rows}
        assert len(rows) == 4 * 3
        (weights,) = (folder / "checkpoints" / "originals").glob("*.safetensors")
        original = load_model(str(weights), load_task("digits[0-4]"))
        own = Run(0, torch.device("cpu"))
        task = few_of(load_task("digits[8,9]"), 20, own, 0)
        score = Probe("ridge").attack(original, task, budgets=(0, 1, 10), run=own).scores[-1]
        before, after = (rows[model, "probe ridge raw"] for model in ("original", "LEACE"))
        assert before["transfer"].mean == pytest.approx(score)
        assert after["transfer drop"].mean == pytest.approx(score - after["transfer"].mean)
        assert "transfer drop" not in before
        assert sum(f.startswith("Side effects of") for f in result.findings) == 3

    def test_only_where_a_setting_has_a_transfer_task(self, tmp_path):
        settings = {"x": {**SETTING, "transfer": None}}
        found = run(tmp_path, recipe(settings=settings, conditioning=None, epochs=[0, 1], defenses={}))
        assert next(iter(found.tables)) == "probes"
        assert not {"side_effects", "conditioning"} & found.tables.keys()

    def test_errors_have_their_own_unit(self, tmp_path):
        """Regression: what a model lost is by how much its error rose."""
        generator = np.random.default_rng(0)
        mixing = generator.normal(size=(6, 3))
        for name in "abc":
            x = generator.normal(size=(300, 6))
            y = x @ mixing[:, "abc".index(name)] + 0.1 * generator.normal(size=300)
            lines = [",".join([*"uvwxzt", "y"]), *(",".join(map(str, (*row, t))) for row, t in zip(x, y, strict=True))]
            (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        settings = {
            "tables": {
                "model": {"name": "mlp"}, "pretrain": {"steps": 60},
                **{
                    role: {"data": data, "kind": "regression", "target": "y"}
                    for role, data in (("benign", "a"), ("restricted", "b"), ("transfer", "c"))
                },
            }
        }  # fmt: skip
        chosen = recipe(
            settings=settings, shots=None, defenses={"LEACE": {"name": "leace"}}, epochs=[0, 1], paper={},
            conditioning={"groups": 2, "samples": 30},
        )  # fmt: skip
        found = run(tmp_path / "out", chosen, data_dir=tmp_path)
        rows = {(r["model"], r["attack"]): r for r in found.tables["side_effects"].rows}
        before, after = (rows[m, "probe ridge raw"] for m in ("original", "LEACE"))
        rise = after["transfer rise"].mean
        assert rise == pytest.approx(after["transfer"].mean - before["transfer"].mean, rel=1e-9)
        assert "benign" in found.tables["conditioning"].rows[0]
        most = max(row["transfer rise"].mean for (model, _), row in rows.items() if model == "LEACE")
        (text,) = (f for f in found.findings if f.startswith("Side effects"))
        assert f"({abs(most):.3g} {'lost' if most >= 0 else 'gained'}; of 3 attacks" in text


class TestResume:
    def test_a_second_call_measures_nothing_again(self, folder, tmp_path, monkeypatch):
        copied = tmp_path / "again"
        shutil.copytree(folder, copied)
        (copied / "result.json").unlink()

        def never(*_):
            raise AssertionError("was measured before")

        monkeypatch.setattr("holdfast.experiments.measurements.condition_numbers._measure", never)
        monkeypatch.setattr("holdfast.experiments.measurements.attack_curves._attack", never)
        assert run(copied).numbers() == read_result(folder).numbers()

    @pytest.mark.parametrize("name", ["conditioning", "side-effects"])
    def test_a_damaged_journal_is_named(self, name, folder, tmp_path):
        copied = tmp_path / "again"
        shutil.copytree(folder, copied)
        (copied / "result.json").unlink()
        journal = copied / "checkpoints" / f"{name}.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        lines[1]["value"] = {"nonsense": 1}
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(HoldfastError, match=f"{name}.jsonl' is damaged"):
            run(copied)


class TestPaperSpec:
    def test_numbers_may_have_a_spread(self):
        spec = PaperSpec(benign=(62.36, 0.173), rir=3.467)
        found = scene(paper={"original": spec}).benign("original")
        assert (found.paper, found.paper_sd) == (pytest.approx(0.6236), pytest.approx(0.00173))
