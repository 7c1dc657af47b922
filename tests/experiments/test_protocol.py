"""Protocols: every table, figure and sentence from what was measured; resumable; reuse; the recipes at every scale."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch

from children import start, wait_for
from holdfast.adversaries import Adversary, FineTuning, Probe
from holdfast.auditing.trials import few_of
from holdfast.defenses import NTL, Sophon
from holdfast.errors import HoldfastError
from holdfast.experiments.measurements.attack_curves import Attack, AttackSpec, rescaled, scratch_plan
from holdfast.experiments.protocol import ProtocolSpec
from holdfast.experiments.recipe import ProtocolRecipe, load
from holdfast.experiments.runner import run_recipe
from holdfast.models import load_model
from holdfast.results import Curve, read_result
from holdfast.results.tables import Cell, Lines
from holdfast.runtime.documents import read_yaml, recipe_names, recipe_text
from holdfast.runtime.run import Run
from holdfast.tasks import TaskSpec, load_task
from holdfast.tasks.downloads import TEXTS
from holdfast.tasks.splits import halves
from holdfast.training import Strategy
from texts import BERT

PROTOCOLS = [name for name in recipe_names() if read_yaml(recipe_text(name), name).get("kind") == "protocol"]
DEFENSES = {
    "NTL": {"name": "ntl", "iterations": 2, "batch_size": 20, "holdout": 0.05},
    "SOPHON": {"name": "sophon", "iterations": 2, "steps": 2, "batch_sizes": [20], "reinforcement_batch": 32},
}
BASE = {
    "kind": "protocol",
    "title": "A protocol",
    "threads": 1,
    "seeds": 2,
    "epochs": [0, 1, 2],
    "shots": 4,
    "settings": {
        "digits": {
            "model": {"name": "cnn", "options": {"width": 4, "hidden": 16}},
            "pretrain": {"steps": 60},
            "benign": {"data": "digits[0-4]", "test_limit": 50},
            "restricted": {"data": "digits[5-9]", "test_limit": 50},
        }
    },
    "defenses": DEFENSES,
    "attacks": {
        "direct": {"batch_size": 5, "learning_rate": 1e-2},
        "new head": {"batch_size": 5, "learning_rate": 1e-2, "initialisation": "head"},
        "head alone": {"batch_size": 10, "learning_rate": 1e-2, "initialisation": "head", "scope": "head"},
    },
    "paper": {"digits": {"SOPHON": {"benign": 96.2, "attacks": {"direct": {0: 10.0, 1: [10.5, 0.8]}}}}},
}


def recipe(**changes):
    return ProtocolRecipe.model_validate({**BASE, **changes})


def run(folder, chosen=None, **more):
    return run_recipe(chosen or recipe(), folder=folder, device="cpu", quiet=True, **more)


def rows(result, name="accuracy", *by):
    return {tuple(row[key] for key in (by or ("model", "attack"))): row for row in result.tables[name].rows}


def immunizations(result):
    """What the same recipe gives, however its models were had."""
    numbers = result.numbers()
    for row in numbers["tables"]["immunization"]["rows"]:
        del row["from"]
    return {**numbers, "findings": [f for f in numbers["findings"] if "reused" not in f]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a whole protocol."""
    made = tmp_path_factory.mktemp("protocols") / "whole"
    run(made)
    return made


@pytest.fixture(scope="module")
def result(folder):
    return read_result(folder)


class TestSchema:
    def test_an_attack_may_undo_something_first(self):
        spec = ProtocolRecipe.model_validate({**BASE, "attacks": {"A": {}, "B": {"undo": ["revive", "invert-inputs"]}}})
        assert [attack.adversary.undo for attack in spec.plan()] == [(), ("revive", "invert-inputs")]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"settings": {}}, "settings is empty"),
            ({"compare_with": "SOFON"}, "defense to compare with: 'SOFON'"),
            ({"epochs": [1, 2]}, "the first 0"),
            ({"epochs": [0, 5, 5]}, "ascending"),
            ({"defenses": {"original": {"name": "ntl"}}}, "a defense is called 'original'"),
            ({"defenses": {"X": {"name": "sofon"}}}, "did you mean 'sophon'"),
            ({"defenses": {"X": {"name": "ntl", "stepz": 1}}}, "Unknown setting of defense 'ntl': 'stepz'"),
            ({"defenses": {"X": {"name": "ntl", "iterations": 0}}}, "iterations is 0"),
            ({"immunizations": 3}, "seeds is 2 and immunizations 3"),
            ({"battery": "quick-v1"}, "both attacks and a battery"),
            ({"attacks": {}, "battery": "quick-v9"}, "quick-v9"),
            ({"attacks": {}, "defenses": {}}, "nothing to do"),
            ({"attacks": {"A": {"optimizer": "adm"}}}, "did you mean 'adam'"),
            ({"attacks": {"A": {"learning_rate": 0}}}, "learning_rate is 0"),
            ({"attacks": {"A": {"undo": ["reviv"]}}}, "did you mean 'revive'"),
            ({"attacks": {"A": {"scopes": "all"}}}, "Unknown key 'attacks.A.scopes'"),
            ({"attacks": {"A": {}, "B": {"batch_size": 200}}}, "'A' and 'B' have the same settings"),
            ({"attacks": {"A": {"more_epochs": [2]}}}, "above 2"),
            ({"precision": "fp16"}, "precision is 'fp16'"),
            ({"immunisations": 1}, "did you mean 'immunizations'"),
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
            ({"shots": 1000}, "lower `shots`"),
            ({"settings": {"x": {**BASE["settings"]["digits"], "pretrain": None}}}, "Setting 'x': the model has no w"),
            ({"settings": {"x": {**BASE["settings"]["digits"], "restricted": {"data": "digitz"}}}}, "mean 'digits'"),
        ],
    )
    def test_what_does_not_fit_costs_nothing(self, changes, message, tmp_path):
        with pytest.raises(HoldfastError, match=message):
            run(tmp_path / "new", recipe(**changes))
        assert not (tmp_path / "new").exists()

    def test_code_is_not_run_from_a_recipe(self, tmp_path):
        path = tmp_path / "mine.yaml"
        settings = {"x": {**BASE["settings"]["digits"], "model": {"name": "evil.py:make"}}}
        path.write_text(json.dumps({**BASE, "settings": settings}))
        with pytest.raises(HoldfastError, match="made by code"):
            load(str(path))

    def test_an_override_changes_one_setting_even_where_yaml_aliases_it(self):
        one = "settings.CIFAR-10 to MNIST.benign.test_limit=7"
        found = load("sophon/domains", overrides=[one]).settings
        assert {name: s.benign.test_limit for name, s in found.items()} == {
            name: 7 if "MNIST" in name else 1000 for name in found
        }

    def test_the_default_attack_is_the_papers(self):
        (attack,) = recipe(attacks={"A": {}}).plan()
        assert attack.adversary.strategy == Strategy("direct", "all", "momentum", 1e-4, 200, 1e-4)

    def test_an_attack_takes_every_setting_of_fine_tuning(self):
        settings = {
            "optimizer": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "schedule_steps": 20, "warmup": 2,
            "micro_batch": 4, "anchor": 0.5, "replay": 0.25, "benign_first": 3, "burn_in": 1, "undo": ["revive"],
        }  # fmt: skip
        (attack,) = recipe(attacks={"A": settings}, precision="bf16").plan()
        built = attack.adversary.config()
        assert {key: built[key] for key in settings} == settings
        assert built["precision"] == "bf16"
        known = {f.name for kind in (Strategy, FineTuning) for f in dataclasses.fields(kind)}
        own = {"strategy", "name", "precision", "more_epochs", "stands_for"}
        assert set(AttackSpec.model_fields) - own == known - own

    def test_a_battery_takes_the_place_of_attacks(self):
        plan = recipe(attacks={}, battery="quick-v1", precision="bf16").plan()
        assert len(plan) == 8
        assert all(a.adversary.strategy.precision == "bf16" and a.label.endswith("bf16") for a in plan)
        probes = recipe(attacks={}, battery="probes-v1", precision="bf16").plan()
        assert all(isinstance(a.adversary, Probe) for a in probes)


class TestPlan:
    def test_training_from_scratch_once_for_all_that_start_elsewhere(self, trained, restricted):
        plan = recipe().plan()
        ((attack, covered),) = scratch_plan(plan, trained, restricted)
        assert attack.label == "direct / new head"
        assert [a.label for a in covered] == ["direct", "new head"]
        assert attack.adversary.strategy.initialisation == "direct"

    def test_other_settings_are_other_trainings(self, trained, restricted):
        def attack(name, **settings):
            return Attack(name, FineTuning(Strategy(**settings)), (0, 1), name)

        plan = [
            attack("a"), attack("b", optimizer="sgd"), attack("c", learning_rate=0.5), attack("d", batch_size=7),
            attack("e", weight_decay=0.1), attack("f", scope="norm"), attack("g", initialisation="last-half"),
            attack("h", scope="head"), Attack("probe", Probe(), (0, 1), "probe"),
        ]  # fmt: skip
        assert [[a.label for a in covered] for _, covered in scratch_plan(plan, trained, restricted)] == [
            ["a", "g"], ["b"], ["c"], ["d"], ["e"], ["f"],
        ]  # fmt: skip

    def test_scratch_has_a_head_for_the_tasks_classes(self, trained):
        ((attack, _),) = scratch_plan(recipe().plan()[:1], trained, load_task("digits[7-9]"))
        assert attack.adversary.strategy.initialisation == "head"

    def test_an_epoch_is_every_sample_once(self, folder):
        budgets = {
            tuple(json.loads(entry["key"])[1:3]): entry["value"]["budgets"]
            for entry in map(json.loads, (folder / "checkpoints" / "trials.jsonl").read_text().splitlines()[1:])
        }
        assert budgets["SOPHON", "direct"] == [0, 4, 8]  # 5 classes of 4 images in batches of 5
        assert budgets["SOPHON", "head alone"] == [0, 2, 4]

    def test_an_epoch_may_be_of_the_whole_task_or_cut_short(self, tmp_path):
        attacks = {"A": {"batch_size": 20, "learning_rate": 1e-2}}
        few = {"defenses": {}, "seeds": 1, "epochs": [0, 1], "attacks": attacks}
        whole = run(tmp_path / "whole", recipe(**few, epoch_of="task"))
        steps = math.ceil(load_task("digits[5-9]").size("train") / 20)
        assert f"An epoch has {steps} steps" in whole.tables["accuracy"].note
        cut = run(tmp_path / "cut", recipe(**few, epoch_of="task", max_steps_per_epoch=3))
        assert "An epoch has 3 steps" in cut.tables["accuracy"].note


class TestTables:
    def test_a_row_for_every_model_and_attack(self, result):
        attacks = list(BASE["attacks"])
        expected = [("scratch", "direct / new head"), *itertools.product(("original", "NTL", "SOPHON"), attacks)]
        assert list(rows(result)) == expected
        for row in result.tables["accuracy"].rows:
            assert all(row[f"epoch {e}"].n == 2 and 0 <= row[f"epoch {e}"].mean <= 1 for e in (0, 1, 2))

    def test_the_numbers_are_those_of_the_attack_itself(self, result, folder):
        """One trial by hand: the same adversary on the immunized model, with the same samples."""
        restricted = load_task(BASE["settings"]["digits"]["restricted"]["data"])
        task = halves(restricted.limit_test(50, 0))[1]
        own = Run(0, torch.device("cpu"))
        notes = (folder / "checkpoints" / "immunized").glob("*.json")
        (sophon,) = [p for p in notes if json.loads(p.read_text())["made_of"]["defense"] == "sophon"]
        model = load_model(str(sophon.with_suffix(".safetensors")), load_task("digits[0-4]"))
        adversary = recipe().plan()[0].adversary
        curves = [
            adversary.attack(model, few_of(task, 4, own, s), budgets=(0, 4, 8), run=own, seed=s).scores for s in (0, 1)
        ]
        row = rows(result)["SOPHON", "direct"]
        means = [sum(scores) / 2 for scores in zip(*curves, strict=True)]
        assert [row[f"epoch {e}"].mean for e in (0, 1, 2)] == pytest.approx(means)

    def test_the_papers_numbers_stand_beside_ours(self, result):
        table = rows(result)
        assert table["SOPHON", "direct"]["benign"].paper == 0.962
        first, second = (table["SOPHON", "direct"][f"epoch {e}"] for e in (0, 1))
        assert (first.paper, first.paper_sd) == (0.1, None)
        assert (second.paper, second.paper_sd) == (pytest.approx(0.105), pytest.approx(0.008))
        assert table["NTL", "direct"]["epoch 1"].paper is table["SOPHON", "new head"]["epoch 1"].paper is None

    def test_the_original_is_scored_on_its_own_task(self, result):
        table = rows(result)
        assert table["scratch", "direct / new head"]["benign"] == Cell.of([])
        assert table["original", "direct"]["benign"].mean > 0.5
        best = rows(result, "best", "model")
        for name in ("NTL", "SOPHON"):
            drop = best["original",]["benign"].mean - best[name,]["benign"].mean
            assert best[name,]["benign drop"].mean == pytest.approx(drop)

    def test_how_models_were_immunized(self, result):
        row = rows(result, "immunization", "defense")["SOPHON",]
        assert (row["ended"], row["from"], row["rounds"].mean, row["rollbacks"].mean) == (
            "completed", "here", 2, 0,
        )  # fmt: skip
        assert row["last loss"].mean is not None
        assert row["largest jump"].mean > 0
        assert row["non-finite from"] == Cell.of([])
        assert any("immunize digits: SOPHON, seed 0" in stage for stage in result.timing)

    def test_figures(self, result):
        titles = {figure.title: figure for figure in result.figures.values()}
        assert list(titles) == ["direct", "new head", "head alone", "Best attack on each model", "Suppression loss"]
        assert list(titles["direct"].series) == ["scratch", "original", "NTL", "SOPHON"]
        assert list(titles["head alone"].series) == ["original", "NTL", "SOPHON"]
        assert titles["direct"].series["NTL"][2] == rows(result)["NTL", "direct"]["epoch 2"].mean
        assert list(titles["Suppression loss"].series) == ["SOPHON"]
        assert len(titles["Suppression loss"].x) == 2

    def test_attacks_may_go_on_for_longer(self, tmp_path):
        attacks = {"A": {"batch_size": 5}, "B": {"batch_size": 5, "optimizer": "adam", "more_epochs": [3]}}
        found = run(tmp_path, recipe(attacks=attacks, seeds=1, defenses={}))
        table = rows(found)
        assert "epoch 3" not in table["original", "A"]
        assert table["original", "B"]["epoch 3"].n == table["scratch", "B"]["epoch 3"].n == 1
        assert "epoch 3" not in found.tables["best"].rows[0]
        figure = found.figures["attack_1"]
        assert isinstance(figure, Lines)
        assert figure.x == [0, 1, 2, 3]

    def test_an_attack_that_cannot_start_has_a_row_that_says_so(self, tmp_path):
        tasks = {"benign": {"data": "digits[0-2]"}, "restricted": {"data": "digits[3-9]"}}
        setting = {**BASE["settings"]["digits"], **tasks}
        attacks = {name: BASE["attacks"][name] for name in ("direct", "new head")}
        found = run(tmp_path, recipe(settings={"digits": setting}, attacks=attacks, defenses={}, seeds=1))
        table = rows(found)
        assert "3 outputs, and the task has 7 classes" in table["original", "direct"]["remark"]
        assert "epoch 1" not in table["original", "direct"]
        assert table["original", "new head"]["epoch 1"].n == table["scratch", "direct / new head"]["epoch 1"].n == 1
        assert any("direct is not applicable" in finding for finding in found.findings)

    def test_every_defense_seed_is_attacked_and_none_twice(self, tmp_path):
        one = {"NTL": {**DEFENSES["NTL"], "iterations": 1}}
        attacks = {"direct": BASE["attacks"]["direct"]}
        found = run(tmp_path, recipe(defenses=one, immunizations=2, attacks=attacks))
        assert rows(found)["NTL", "direct"]["benign"].n == 2
        assert [row["seed"] for row in found.tables["immunization"].rows] == ["0", "1"]
        models = {name: facts.sha256 for name, facts in found.provenance.models.items()}
        assert models["digits: NTL, seed 0"] != models["digits: NTL, seed 1"]
        starts = {
            json.loads(entry["key"])[3]: entry["value"]["scores"][0]
            for entry in map(json.loads, (tmp_path / "checkpoints" / "trials.jsonl").read_text().splitlines()[1:])
            if json.loads(entry["key"])[1] == "NTL"
        }
        task = load_task("digits[5-9]").limit_test(50, 0)
        for path in (tmp_path / "checkpoints" / "immunized").glob("*.json"):
            seed = json.loads(path.read_text())["made_of"]["seed"]
            model = load_model(str(path.with_suffix(".safetensors")), load_task("digits[0-4]"))
            assert task.score(model) == pytest.approx(starts[seed])  # attack seed s begins at the model of seed s

    def test_without_attacks_there_are_benign_scores_and_histories(self, tmp_path):
        wild = {"name": "sophon", "loss": "ce-ascent", "guard": False, "iterations": 3, "steps": 1, "batch_sizes": [20]}
        found = run(tmp_path, recipe(attacks={}, immunizations=2, seeds=1, defenses={"wild": wild}))
        assert [row["model"] for row in found.tables["accuracy"].rows] == ["original", "wild"]
        assert list(found.tables) == ["accuracy", "immunization"]
        assert [f.series.keys() for f in found.figures.values()] == [{"wild", "wild, seed 1"}]


REGRESSION = {
    "model": {"name": "mlp"},
    "pretrain": {"steps": 100},
    "benign": {"data": "a", "kind": "regression", "target": "y"},
    "restricted": {"data": "b", "kind": "regression", "target": "y"},
}
ERRORS = {
    "settings": {"tables": REGRESSION},
    "defenses": {"frontier": {"name": "signal-frontier"}},
    "attacks": {name: BASE["attacks"][name] for name in ("direct", "new head")},
    "paper": {"tables": {"frontier": {"benign": 0.05, "attacks": {"direct": {1: [0.614, 0.0046]}}}}},
}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A folder with two tables of numbers."""
    made = tmp_path_factory.mktemp("tables")
    generator = np.random.default_rng(0)
    for name in "ab":
        x = generator.normal(size=(120, 4))
        table = np.column_stack([x, x @ generator.normal(size=4) + 3])
        np.savetxt(made / f"{name}.csv", table, delimiter=",", header="p,q,r,s,y", comments="")
    return made


@pytest.fixture(scope="module")
def of_errors(numbers, tmp_path_factory):
    """The folder of a whole protocol on them."""
    made = tmp_path_factory.mktemp("errors") / "whole"
    run(made, recipe(**ERRORS), data_dir=numbers)
    return made


class TestErrors:
    """Regression: scored by an error, and shown as one."""

    def test_what_is_shown_is_the_mean_over_seeds_of_the_errors_themselves(self, of_errors, numbers):
        """Trials by hand. Each seed has other samples, so that the error of a guess is another one."""
        restricted = load_task(TaskSpec(**REGRESSION["restricted"]), data_dir=numbers)
        benign = load_task(TaskSpec(**REGRESSION["benign"]), data_dir=numbers)
        own = Run(0, torch.device("cpu"))
        (weights,) = (of_errors / "checkpoints" / "immunized").glob("*.safetensors")
        model = load_model(str(weights), benign)
        tasks = [few_of(halves(restricted)[1], 4, own, s) for s in (0, 1)]
        assert abs(tasks[0].chance / tasks[1].chance - 1) > 0.01
        adversary = recipe(**ERRORS).plan()[0].adversary
        curves = [adversary.attack(model, task, budgets=(0, 1, 2), run=own, seed=s) for s, task in enumerate(tasks)]
        errors = [[(1 - v) * t.chance for v in c.scores] for c, t in zip(curves, tasks, strict=True)]
        found = read_result(of_errors)
        row = rows(found, "error")["frontier", "direct"]
        for k in (0, 1, 2):
            assert row[f"epoch {k}"].mean == pytest.approx((errors[0][k] + errors[1][k]) / 2, rel=1e-5)
        assert row["epoch 0"].mean == pytest.approx(restricted.score(model), rel=1e-5)
        assert row["epoch 0"].sd == pytest.approx(0, abs=1e-9)  # one model, and the same test samples
        assert row["benign"].mean == pytest.approx(benign.score(model), rel=1e-5)
        assert "accuracy" not in found.tables

    def test_the_same_errors_by_another_chance(self):
        """An error of 0.1 is a score of 0.5 where chance is 0.2, and of 0 where it is 0.1."""
        given = Curve(
            adversary="A", role="immunized", seed=0, budgets=[0, 1], scores=[0.5, None], losses=[None, 0.1],
            folds=[[0.25, 0.75], None], batch_size=5,
        )  # fmt: skip
        found = rescaled(given, 0.2 / 0.1)
        assert found.scores == [0, None]
        assert found.folds == [[-0.5, 0.5], None]
        assert given.scores == [0.5, None]

    def test_the_advantage_is_how_much_smaller_the_error_is_than_from_scratch(self, of_errors):
        found = read_result(of_errors)
        best, advantage = (rows(found, name, "model") for name in ("best", "advantage"))
        for epoch in ("epoch 1", "epoch 2"):
            smaller = best["scratch",][epoch].mean - best["original",][epoch].mean
            assert advantage["original",][epoch].mean == pytest.approx(smaller)

    def test_pages(self, of_errors, numbers, tmp_path, capsys):
        from holdfast.cli.main import main

        page = (of_errors / "report.html").read_text()
        assert "Mean squared error over epochs" in page
        assert "paper 0.614 ± 0.0046" in page
        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({**BASE, **ERRORS}))
        with pytest.raises(SystemExit) as ended:
            main(["run", str(path), "--out", str(tmp_path / "out"), "--device", "cpu", "--data-dir", str(numbers)])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert "Mean squared error over epochs" in shown
        assert "in %" not in shown
        start = rows(read_result(of_errors), "error")["frontier", "direct"]["epoch 0"].mean
        assert f"{start:.4g}" in shown

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"one": {**REGRESSION, "benign": {"data": "digits[0-4]"}}},
                "the benign task 'digits[0-4]' of setting 'one' is scored by accuracy, and the restricted task 'b:y' "
                "of setting 'one' by explained variance",
            ),
            (
                {"one": BASE["settings"]["digits"], "two": REGRESSION},
                "the restricted task 'b:y' of setting 'two' is scored by explained variance, and the restricted task "
                "'digits[5-9]' of setting 'one' by accuracy",
            ),
        ],
    )
    def test_kinds_are_not_mixed(self, settings, message, numbers, tmp_path):
        with pytest.raises(HoldfastError, match=re.escape(message)):
            run(tmp_path / "new", recipe(settings=settings, defenses={}), data_dir=numbers)
        assert not (tmp_path / "new").exists()


class TestResume:
    def test_interrupted_anywhere_and_continued_to_the_same_numbers(self, tmp_path, result, monkeypatch):
        def interrupted(kind, name, at):
            count, original = itertools.count(1), getattr(kind, name)

            def called(self, *arguments, **more):
                if next(count) == at:
                    raise KeyboardInterrupt
                return original(self, *arguments, **more)

            with monkeypatch.context() as patch:
                patch.setattr(kind, name, called)
                with pytest.raises(KeyboardInterrupt):
                    run(tmp_path)

        interrupted(Sophon, "immunize", 1)
        assert len(list((tmp_path / "checkpoints" / "immunized").glob("*.json"))) == 1
        interrupted(Adversary, "attack", 6)
        assert (tmp_path / "checkpoints" / "trials.jsonl").read_text().count("\n") == 6
        with monkeypatch.context() as patch:
            patch.setattr(Sophon, "immunize", lambda *_, **__: pytest.fail("immunized again"))
            assert run(tmp_path).numbers() == result.numbers()
        assert not (tmp_path / "checkpoints" / "immunizing").exists() or not list(
            (tmp_path / "checkpoints" / "immunizing").iterdir()
        )

    def test_a_complete_folder_is_not_run_again(self, folder, result, monkeypatch):
        monkeypatch.setattr(Adversary, "attack", lambda *_, **__: pytest.fail("attacked again"))
        assert run(folder).numbers() == result.numbers()

    def test_another_protocol_is_refused(self, folder):
        with pytest.raises(HoldfastError, match="differs in: seeds"):
            run(folder, recipe(seeds=3))

    def test_killed_in_the_middle_of_an_immunization(self, tmp_path):
        slow = {"SOPHON": {**DEFENSES["SOPHON"], "iterations": 40, "guard_every": 1}}
        attacks = {"direct": BASE["attacks"]["direct"]}
        settings = {**BASE, "defenses": slow, "attacks": attacks, "seeds": 1}
        path, out = tmp_path / "mine.yaml", tmp_path / "out"
        path.write_text(json.dumps(settings))
        process = start("run", path, "--device", "cpu", "--out", out)
        begun = "checkpoints/immunizing/*/checkpoints/immunization.safetensors"
        wait_for(lambda: bool(list(out.glob(begun))), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(out.glob("checkpoints/immunized/*"))
        assert run(out, load(str(path))).numbers() == run(tmp_path / "whole", load(str(path))).numbers()

    def test_the_same_on_processes(self, tmp_path):
        brief = recipe(defenses={"SOPHON": DEFENSES["SOPHON"]}, attacks={"direct": BASE["attacks"]["direct"]})
        # One worker for each of the two stages: that several share their jobs is a matter of the executors' own tests.
        apart = run(tmp_path / "apart", brief, executor="processes:1")
        assert apart.numbers() == run(tmp_path / "here", brief).numbers()


class TestReuse:
    def test_the_same_models_are_taken_and_it_is_said(self, folder, result, tmp_path, monkeypatch, capsys):
        for kind in (Sophon, NTL):
            monkeypatch.setattr(kind, "immunize", lambda *_, **__: pytest.fail("immunized again"))
        found = run_recipe(recipe(), folder=tmp_path, device="cpu", quiet=False, reuse=[folder])
        said = " ".join(capsys.readouterr().err.split())
        assert "Reusing the original from" in said
        assert "Reusing SOPHON, seed 0, in 'digits' from" in said
        assert {row["from"] for row in found.tables["immunization"].rows} == {f"reused from {folder}"}
        assert any(f"SOPHON was not immunized here, but reused from {folder}" in f for f in found.findings)
        assert immunizations(found) == immunizations(result)

    def test_other_attacks_on_the_same_models(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(Sophon, "immunize", lambda *_, **__: pytest.fail("immunized again"))
        attacks = {"Adam": {"optimizer": "adam", "batch_size": 5}}
        found = run(tmp_path, recipe(attacks=attacks, seeds=1), reuse=[folder])
        assert rows(found)["SOPHON", "Adam"]["epoch 2"].n == 1

    def test_what_is_not_there_is_made_and_named(self, folder, tmp_path, capsys):
        other = {"NTL": DEFENSES["NTL"], "longer": {**DEFENSES["NTL"], "iterations": 1}}
        changes = {"defenses": other, "attacks": {}, "seeds": 1}
        found = run_recipe(recipe(**changes), folder=tmp_path, device="cpu", quiet=False, reuse=[folder])
        assert [row["from"].split(" from")[0] for row in found.tables["immunization"].rows] == [
            "reused", "here",
        ]  # fmt: skip
        said = " ".join(capsys.readouterr().err.split())
        assert "longer, seed 0, in 'digits' (longer, seed 0: the nearest differs in defense.iterations)" in said

    def test_folders_without_models_are_refused_before_any_work(self, tmp_path):
        with pytest.raises(HoldfastError, match="holds no immunized model"):
            run(tmp_path / "new", reuse=[tmp_path])
        assert not (tmp_path / "new").exists()

    def test_damaged_notes_are_not_passed_over(self, folder, tmp_path):
        other = shutil.copytree(folder, tmp_path / "other")
        notes = next((other / "checkpoints" / "immunized").glob("*.json"))
        notes.write_text('{"made_of": {}, "made_of": {}}')
        with pytest.raises(HoldfastError, match=r"json' is damaged \(the key 'made_of' is given twice\); delete it"):
            run(tmp_path / "new", reuse=[other])
        assert not (tmp_path / "new").exists()

    def test_folders_with_none_that_fits_are_refused(self, folder, tmp_path):
        other = {"SOPHON": {**DEFENSES["SOPHON"], "steps": 3}}
        with pytest.raises(HoldfastError, match=r"needs none of its 2 immunized models.*differs in defense\.steps"):
            run(tmp_path, recipe(defenses=other), reuse=[folder])

    def test_changed_weights_are_refused(self, folder, tmp_path):
        bad = tmp_path / "bad"
        shutil.copytree(folder, bad)
        for weights in (bad / "checkpoints" / "immunized").glob("*.safetensors"):
            raw = bytearray(weights.read_bytes())
            raw[-1] ^= 1
            weights.write_bytes(raw)
        with pytest.raises(HoldfastError, match="another SHA-256"):
            run(tmp_path / "new", reuse=[bad])

    def test_only_protocols_reuse(self, folder, tmp_path):
        with pytest.raises(HoldfastError, match="--reuse is for protocols"):
            run_recipe(load("quickstart", scale="smoke"), folder=tmp_path, quiet=True, reuse=[folder])


class TestPages:
    def test_the_report_has_tables_and_figures(self, folder):
        page = (folder / "report.html").read_text()
        for text in ("Accuracy over epochs", "Advantage over scratch", "paper 10.5 ± 0.8", 'id="plot-attack_0"'):
            assert text in page
        assert "Verdict" not in page.split("<script>")[0]

    def test_the_command_line(self, folder, tmp_path, capsys):
        from holdfast.cli.main import main

        path = tmp_path / "mine.yaml"
        path.write_text(json.dumps({**BASE, "attacks": {}}))
        arguments = ["run", str(path), "--out", str(tmp_path / "out"), "--device", "cpu", "--reuse", str(folder)]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert "Benign accuracy" in capsys.readouterr().out


class TestPrecision:
    def test_bf16_trains_in_bf16_and_keeps_the_weights(self, trained, restricted):
        seen, own = set(), Run(0, torch.device("cpu"))
        trained = trained.clone()
        found = {}
        for precision in ("float32", "bf16"):
            adversary = FineTuning(Strategy("direct", "all", "momentum", 1e-2, 20, precision=precision), name="same")
            hook = trained.clone()
            handle = hook.head.register_forward_hook(lambda m, i, o: seen.add((m.training, o.dtype)))
            found[precision] = adversary.attack(hook, restricted, budgets=(0, 30), run=own)
            handle.remove()
        assert (True, torch.bfloat16) in seen
        assert (False, torch.bfloat16) not in seen  # scores are taken in the weights' own precision
        plain, fast = found["float32"], found["bf16"]
        assert plain.losses[1] != fast.losses[1] == pytest.approx(plain.losses[1], rel=0.05)
        assert fast.scores[1] == pytest.approx(plain.scores[1], abs=0.05)

    def test_a_callers_autocast_stays_in_force(self, trained, restricted):
        from holdfast.training import finetune, prepare

        model, seen = trained.clone(), []
        strategy = Strategy("direct")
        prepare(model, strategy, restricted)
        model.head.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            next(finetune(model, restricted, strategy, generator=torch.Generator(), device=torch.device("cpu")))
        assert seen == [torch.bfloat16]


def scores(result):
    """The first table: of accuracies, or of errors."""
    return result.tables["accuracy" if "accuracy" in result.tables else "error"]


TWINS = ("condition/vit-country211", "condition/resnet18-cars", "condition/resnet18-country211")
"""At smoke scale the same as `condition/vit-cars`, which runs in full."""


def what_runs(recipe):
    """All settings of a recipe but the words about it."""
    found = recipe.resolved()
    for described in ("title", "about", "paper", "source"):
        found.pop(described, None)
    for setting in found["settings"].values():
        del setting["stands_for"]
    return found


class TestRecipes:
    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_every_recipe_runs_at_smoke_scale(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "holdfast.experiments.measurements.sample_images.CLASSIFIER_STEPS", 20
        )  # what a distance is worth is tested elsewhere
        brief = ["defenses={frontier: {name: frontier}}", "battery=null"] if name in TWINS else []
        found = run(tmp_path, load(name, scale="smoke", overrides=brief))
        assert {row["model"] for row in scores(found).rows} >= {"original"}
        assert len(found.tables["immunization"].rows) >= 1

    @pytest.mark.parametrize("name", TWINS)
    def test_twins_differ_in_what_they_stand_for_alone(self, name):
        one, other = (load(each, scale="smoke") for each in (name, "condition/vit-cars"))
        assert what_runs(one) == what_runs(other)

    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_every_number_of_the_paper_is_shown_at_paper_scale(self, name):
        chosen = load(name, scale="paper")
        plan = {attack.stands_for: attack.epochs for attack in chosen.plan()}
        for setting, models in chosen.paper.items():
            assert setting in {s.stands_for or key for key, s in chosen.settings.items()}
            for model, printed in models.items():
                assert model in ("scratch", "original", *chosen.defenses)
                for attack, numbers in printed.attacks.items():
                    assert set(numbers) <= set(plan[attack])

    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_cpu_settings_stand_for_the_papers(self, name):
        chosen = load(name)
        for key, setting in chosen.settings.items():
            assert not chosen.paper or (setting.stands_for or key) in chosen.paper

    @pytest.mark.parametrize("name", ["optimizers", "learning-rates", "batch-sizes"])
    @pytest.mark.parametrize("scale", ["cpu", "paper"])
    def test_the_ablations_are_about_the_models_of_table_1(self, name, scale):
        first, second = (load(f"sophon/{each}", scale=scale) for each in ("overall", name))
        assert first.build_defenses() == second.build_defenses()
        assert first.settings == second.settings
        assert first.seed == second.seed


AT_HAND = {
    "imagenette": "imagenette64", "cinic10": "cifar100_objects", "stl10": "cifar100_people_places", "svhn": "usps",
    "cifar100": "cifar100_objects", "celeba": "faces", "ffhq": "faces", "imagenet": "imagenette64",
    "stanford_cars": "stanford_cars40", "country211": "cifar100_objects", "photos": "imagenette64",
    "concept": "faces", "harmless": "cifar100_objects",
}  # fmt: skip
SIMULATED = {"steps": 1, "evaluate_every": 1, "batch_sizes": [4], "reinforcement_batch": 4}
SMALL = {
    "ntl": {"batch_size": 4}, "sophon": SIMULATED, "trajectory-erasure": {**SIMULATED, "probe_batch": 40},
    "tar": {"batch_size": 4, "steps": 4, "evaluate_every": 2, "batch_sizes": [4]}, "repnoise": {"batch_size": 4},
    "imma-diffusion": {"batch_size": 4, "adaptation": {"batch_size": 4}},
}  # fmt: skip
DEEP = {"batch_size": 8, "restricted_batch": 40, "epochs": None, "blocks": 1}
IN_CLOSED_FORM = ("frontier", "signal-frontier", "leace", "concept-erasure")
DENOISERS = {
    "denoising": {"name": "unet", "options": {"widths": [8], "attention": 4}},
    "text-to-image": {"name": "text-unet", "options": {"widths": [8], "attention": 4}},  # in the middle alone
}
FEW = {"train_limit": 400, "test_limit": 10}
BRIEF = {"iterations": 2, "holdout": 0.04, "guard_every": 10, "max_benign_drop": 1.0}


WORDS = {"tokenizer": "words", "length": 8, "train_limit": 400}
READER = {"name": "hf:tiny", "options": {"config": {**BERT, "vocab_size": 1024}}}


def brief(name, network, iterations=2):
    """A recipe's paper scale, on the data at hand and for a few rounds of everything; `network` instead of its own."""
    chosen = load(name, scale="paper")
    changed = chosen.model_dump(mode="json", exclude={"scales"})
    for setting in changed["settings"].values():
        if setting["restricted"]["kind"] == "next-token":
            setting["benign"] |= FEW | {"sampled": 200, "length": 8}
            for role in (role for role in ("restricted", "transfer") if setting[role]):
                setting[role] |= FEW | {"length": 8}
            continue
        setting["pretrain"] = (setting["pretrain"] or {}) | {"steps": 2, "batch_size": 4}
        for role in (role for role in ("benign", "restricted", "transfer") if setting[role]):
            data = AT_HAND.get(setting[role]["data"], setting[role]["data"])
            setting[role] |= {"data": data, **FEW, **({"channels": 3} if data in ("usps", "faces") else {})}
            if network is not None:
                setting[role] |= WORDS if data in TEXTS else {"image_size": 8}
        if network is not None:
            network = READER if setting["benign"]["data"] in TEXTS else network
            setting["model"] = DENOISERS.get(setting["benign"]["kind"], network)
    changed["settings"] = distinct(changed["settings"])
    for defense in changed["defenses"].values():
        if defense["name"] not in IN_CLOSED_FORM:
            defense.update(BRIEF | SMALL.get(defense["name"], DEEP) | {"iterations": iterations})
        for strategy in defense.get("strategies") or []:
            strategy["batch_size"] = 4
    changed |= {"shots": 1, "seeds": 1, "immunizations": 1, "epochs": [0, 2], "epoch_of": "samples"}
    changed["attacks"] = {label: attack for label, attack in changed["attacks"].items() if label in only_here(name)}
    for attack in changed["attacks"].values():
        attack["more_epochs"] = [3 for _ in attack["more_epochs"][:1]]
    changed["max_steps_per_epoch"] = 1
    if changed["conditioning"] is not None:
        changed["conditioning"] = {"groups": 2, "samples": 5}
    if changed["pictures"] is not None:
        early = changed["pictures"]["early"][:1]
        changed["pictures"] |= {
            "samples": 2,
            "denoised": 2,
            "measured": 4,
            "ddim_steps": 2,
            "error_steps": 2,
            "early": early,
        }
    return ProtocolRecipe.model_validate(with_one_attack(changed) if changed["battery"] else changed)


def distinct(settings):
    """The first of those settings that differ in names alone, as with the same network in place of theirs."""
    kept = {}
    for name, setting in settings.items():
        unnamed = {**setting, "stands_for": None}
        if unnamed not in [{**each, "stands_for": None} for each in kept.values()]:
            kept[name] = setting
    return kept


def only_here(name):
    """Labels of a paper scale's attacks without those that the smoke scale runs as they are; at least one."""
    chosen, brief = (load(name, scale=scale) for scale in ("paper", "smoke"))
    shown = [chosen.pictures.attack] if chosen.pictures is not None and chosen.pictures.attack is not None else []
    own = [label for label, attack in chosen.attacks.items() if attack != brief.attacks.get(label)]
    return [*own, *shown, *chosen.transfer_attacks] or list(chosen.attacks)[:1]


def with_one_attack(changed):
    """In place of a battery, as these are tested with the adversaries, and run at the smoke scale."""
    attacks = {"battery": None, "attacks": {"direct": {"batch_size": 4}}}
    named = {"transfer_attacks": changed["transfer_attacks"] and ["direct"]}
    if changed["pictures"] is not None:
        named["pictures"] = {**changed["pictures"], "attack": "direct"}
    return {**changed, **attacks, **named}


ONE_STEP = {
    "iterations": 1, "steps": 1, "evaluate_every": 1, "tasks": 1, "batch_sizes": (2,), "reinforcement_batch": 2,
    "max_benign_drop": 1.0, "guard": False, "initialisations": ("direct",),
}  # fmt: skip
"""SOPHON on networks of the papers' size."""


SMALL_NETWORK = {"name": "cifar_resnet", "options": {"depth": 8}}
BRIEF_TWINS = {
    "condition/resnet18-cars": "condition/vit-cars",
    "condition/resnet18-country211": "condition/vit-country211",
    "sophon/generation-domains": "sophon/generation",
}
"""Recipes that are the same as another one when `brief` has replaced the network and the data."""


class TestPaperScale:
    """Everything of the paper's scale but its length."""

    @pytest.mark.parametrize(("name", "other"), BRIEF_TWINS.items())
    def test_brief_twins_differ_in_words_alone(self, name, other):
        one, two = (what_runs(brief(each, SMALL_NETWORK)) for each in (name, other))
        assert list(one.pop("settings").values()) == list(two.pop("settings").values())
        assert one == two

    @pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in BRIEF_TWINS])
    def test_starts_and_takes_two_loops_of_everything(self, name, few_data, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "holdfast.experiments.measurements.sample_images.CLASSIFIER_STEPS", 20
        )  # what a distance is worth is tested elsewhere
        if name.startswith(("language/", "causal/stories")):
            pytest.importorskip("pyarrow")
        chosen = brief(name, SMALL_NETWORK)
        found = run(tmp_path, chosen, data_dir=few_data)
        at_once = sum(defense["name"] in IN_CLOSED_FORM for defense in chosen.defenses.values())
        rounds = [row["rounds"].mean for row in found.tables["immunization"].rows]
        assert rounds.count(0) == at_once * len(chosen.settings)
        assert set(rounds) - {0} == {2}
        assert scores(found).rows[0].get("epoch 2", Cell.of([0.0])).mean is not None

    def test_the_papers_network_is_immunized_and_attacked(self, few_data):
        """A step of everything that a network does; `brief` has two, of more attacks and on a small network."""
        chosen = load("sophon/overall", scale="paper")
        setting, defense = next(iter(chosen.settings.values())), chosen.build_defenses()["SOPHON"]
        few = {"train_limit": 50, "test_limit": 2}
        benign = load_task(setting.benign.model_copy(update={**few, "data": AT_HAND["imagenette"]}), data_dir=few_data)
        restricted = load_task(setting.restricted.model_copy(update={**few, "data": "cifar10[0-1]"}), data_dir=few_data)
        model, own = load_model(setting.model, benign), Run(0, torch.device("cpu"))
        assert sum(p.numel() for p in model.parameters()) == 53_922_928  # the paper: 53.9M
        immunized, record = dataclasses.replace(defense, **ONE_STEP).immunize(model, benign, restricted, run=own)
        assert record.completed
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), immunized.parameters(), strict=True))
        attack = next(a.adversary for a in chosen.plan() if a.label == "direct+all")
        brief = dataclasses.replace(attack, strategy=dataclasses.replace(attack.strategy, batch_size=2))
        curve = brief.attack(immunized, restricted, budgets=(0, 1), run=own)
        assert all(score is not None and 0 <= score <= 1 for score in curve.scores)

    def test_the_denoiser_of_the_papers_scale_is_immunized(self, few_data, tmp_path):
        chosen = load("sophon/generation", scale="paper")
        setting, defense = next(iter(chosen.settings.values())), chosen.build_defenses()["SOPHON"]
        at_hand = {"test_limit": 4, "channels": 3, "image_size": 32}
        benign, restricted = (
            load_task(spec.model_copy(update=at_hand | {"data": AT_HAND[spec.data]}), data_dir=few_data).few_shot(20, 0)
            for spec in (setting.benign, setting.restricted)
        )
        model = load_model(setting.model, benign)
        assert sum(p.numel() for p in model.parameters()) == 38_383_107  # Ho et al. 2020: 35.7M, attention at 16 alone
        immunized, record = dataclasses.replace(defense, **ONE_STEP).immunize(model, benign, restricted, run=Run(0))
        assert record.completed
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), immunized.parameters(), strict=True))

    def test_the_papers_architectures_can_be_built(self):
        task = load_task("digits@image_size=64,channels=3")
        sizes = {}
        for name, setting in load("sophon/architectures", scale="paper").settings.items():
            sizes[name] = sum(p.numel() for p in load_model(setting.model, task).parameters()) / 1e6
        assert {name: round(size, 1) for name, size in sizes.items()} == {
            "CAFormer": 53.9, "ResNet-50": 23.5, "ResNet-34": 21.3, "ResNet-18": 11.2, "VGG": 9.6,
        }  # fmt: skip


def test_a_spec_can_be_written_without_a_recipe():
    kept = {k: v for k, v in BASE.items() if k not in ("kind", "title", "threads")}
    assert ProtocolSpec.model_validate(kept).seeds == 2


def test_an_ascent_that_ends_in_no_number_is_a_result(tmp_path):
    """Figure 14 of the paper: the loss runs away, and everything after it still has its line in the report."""
    sizes = {"iterations": 30, "steps": 2, "batch_sizes": [8], "reinforcement_batch": 8, "learning_rates": [1e-3]}
    loose = {"guard": False, "clip": None, "suppression_lr": 1e20, "initialisations": ["direct"]}
    digits = {
        "model": {"name": "unet", "options": {"widths": [8]}},
        "benign": {"data": "digits[0-4]", "kind": "denoising", "test_limit": 10},
        "restricted": {"data": "digits[5-9]", "kind": "denoising", "test_limit": 10},
        "pretrain": {"steps": 2, "batch_size": 8},
    }
    chosen = recipe(
        seeds=1, epochs=[0, 1], shots=8, settings={"digits": digits}, paper={},
        defenses={"MSE ascent": {"name": "sophon", "loss": "mse-ascent", **sizes, **loose}},
        attacks={"direct": {"batch_size": 8}},
        pictures={"samples": 2, "denoised": 2, "measured": 4, "ddim_steps": 2},
    )  # fmt: skip
    found = run(tmp_path, chosen)
    made = found.tables["immunization"].rows[0]
    lost = int(made["non-finite from"].mean)
    assert (made["ended"], made["rounds"].mean) == ("gave up", lost)
    assert any(f"was not finite (round {lost})" in finding for finding in found.findings)
    assert rows(found, "error")["MSE ascent", "direct"]["epoch 1"].mean is None
    assert rows(found, "error")["original", "direct"]["epoch 1"].mean is not None
    assert found.recipe["defenses"]["MSE ascent"]["loss"] == "mse-ascent"
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "pictures" / "samples_restricted.png").is_file()
