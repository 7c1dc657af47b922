from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch

import children
import holdfast
from children import wait_for
from holdfast.cli.main import main
from holdfast.defenses import Sophon
from holdfast.errors import HoldfastError
from holdfast.experiments.recipe import load
from holdfast.experiments.runner import run_recipe
from holdfast.experiments.workspace import REPLACED
from holdfast.losses import LOSSES, inverse_cross_entropy
from holdfast.results import read_result
from holdfast.tasks import load_task
from holdfast.tasks.splits import halves

SMOKE = {"scale": "smoke"}


def numbers(folder):
    return read_result(folder).numbers()


BRIEF = {"iterations": 1, "steps": 1, "batch_sizes": (20,), "device": "cpu"}

ALONE = ("audit.stacked=false", "audit.side_effects=false")
"""Every attack by itself, and on the restricted task only."""

QUICK = ["audit.battery=probes-v1", "audit.seeds=2", "audit.budgets=[0,1]", "pretrain.steps=5", *ALONE]


@pytest.fixture(scope="module")
def quick_folder(tmp_path_factory):
    """The folder of a whole run, briefer than `brief_folder`."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    run_recipe(load("quickstart", **SMOKE, overrides=QUICK), folder=folder, device="cpu", quiet=True)
    return folder


class TestRecipe:
    def test_leaves_a_whole_folder(self, brief_folder):
        assert {p.name for p in brief_folder.iterdir()} >= {
            "result.json",
            "report.html",
            "model.safetensors",
            "checkpoints",
        }

    def test_same_seed_same_numbers(self, brief_folder, tmp_path):
        run_recipe(load("quickstart", **SMOKE), folder=tmp_path, device="cpu", quiet=True)
        assert numbers(tmp_path) == numbers(brief_folder)
        assert (tmp_path / "model.safetensors").read_bytes() == (brief_folder / "model.safetensors").read_bytes()

    def test_another_seed_other_numbers(self, quick_folder, tmp_path):
        other = load("quickstart", **SMOKE, seed=1, overrides=[*QUICK[:1], "audit.seeds=1", *QUICK[2:]])
        found = run_recipe(other, folder=tmp_path, device="cpu", quiet=True)
        curves = {
            (c.role, c.adversary, c.seed): c.scores for c in read_result(quick_folder).audit.curves if c.seed == 0
        }
        again = {(c.role, c.adversary, c.seed): c.scores for c in found.audit.curves}
        assert again.keys() == curves.keys()
        assert sum(scores != curves[key] for key, scores in again.items()) > len(again) / 2

    def test_a_complete_folder_is_not_run_again(self, brief_folder, monkeypatch):
        monkeypatch.setattr(holdfast.Sophon, "immunize", lambda *_, **__: pytest.fail("ran again"))
        before = (brief_folder / "result.json").read_bytes()
        run_recipe(load("quickstart", **SMOKE), folder=brief_folder, device="cpu", quiet=True)
        assert (brief_folder / "result.json").read_bytes() == before

    def test_another_recipes_folder_is_refused_and_kept(self, brief_folder):
        before = (brief_folder / "result.json").read_bytes()
        with pytest.raises(HoldfastError, match=r"differs in: recipe\.audit\.shots|differs in: audit\.shots"):
            run_recipe(load("quickstart", **SMOKE, overrides=["audit.shots=1"]), folder=brief_folder, quiet=True)
        assert (brief_folder / "result.json").read_bytes() == before

    @pytest.mark.trains
    def test_more_seeds_for_a_complete_folder(self, quick_folder, tmp_path, monkeypatch):
        """The model is immunized once; the audit goes on, and remembers that it was reported before."""
        folder = shutil.copytree(quick_folder, tmp_path / "r")
        more = load("quickstart", **SMOKE, overrides=[*QUICK, "audit.decide=true", "audit.max_seeds=3"])
        staged = run_recipe(more, folder=folder, device="cpu", quiet=True)
        assert (folder / "model.safetensors").read_bytes() == (quick_folder / "model.safetensors").read_bytes()
        assert staged.audit.sequential.reported
        assert [c for c in staged.audit.curves if c.seed < 2] == read_result(quick_folder).audit.curves
        monkeypatch.setattr(holdfast.Sophon, "immunize", lambda *_, **__: pytest.fail("ran again"))
        again = run_recipe(more, folder=folder, device="cpu", quiet=True)
        assert again.numbers() == staged.numbers()

    def test_overwrite(self, brief_folder, tmp_path):
        folder = shutil.copytree(brief_folder, tmp_path / "r")
        changed = load("quickstart", **SMOKE, overrides=["audit.shots=1", "pretrain.steps=5", *ALONE])
        assert run_recipe(changed, folder=folder, device="cpu", quiet=True, overwrite=True).audit.shots == 1
        assert not (folder / REPLACED).exists()

    def test_overwriting_with_what_is_refused_later_loses_nothing(self, brief_folder, tmp_path, monkeypatch):
        shutil.copytree(brief_folder, tmp_path / "r")
        before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}

        def refuses(*_, **__):
            raise HoldfastError("this defense does not take such a model")

        monkeypatch.setattr("holdfast.experiments.workspace.pretrain", refuses)
        with pytest.raises(HoldfastError, match="does not take such a model"):
            run_recipe(load("quickstart", **SMOKE), folder=tmp_path / "r", device="cpu", quiet=True, overwrite=True)
        assert {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()} == before

    def test_what_is_overwritten_is_kept_until_something_new_is_finished(self, brief_folder, tmp_path, monkeypatch):
        folder = shutil.copytree(brief_folder, tmp_path / "r")
        before = (folder / "result.json").read_bytes()

        def refuses(*_, **__):
            raise HoldfastError("too late")

        for _ in range(2):  # the second time, what the first one set aside stays
            with monkeypatch.context() as patch:
                patch.setattr("holdfast.experiments.workspace.Workspace.immunize", refuses)
                with pytest.raises(HoldfastError, match="too late"):
                    run_recipe(load("quickstart", **SMOKE), folder=folder, device="cpu", quiet=True, overwrite=True)
            assert (folder / REPLACED / "result.json").read_bytes() == before
            assert not (folder / "result.json").exists()

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["audit.trials=9"], "trials is 9, and quick-v1 is not a search"),
            (["benign.data=digitz"], "did you mean 'digits'"),
            (["model.name=cmn"], "did you mean 'cnn'"),
            (["audit.shots=1000"], "lower `shots`"),
            (["audit.battery=quick"], "did you mean 'quick-v"),
            (["pretrain=null"], "the model has no weights"),
            (["restricted.channels=3"], "cannot take the inputs"),
            (["model.weights=no.safetensors"], "does not exist"),
        ],
    )
    def test_bad_input_costs_nothing(self, tmp_path, overrides, message):
        with pytest.raises(HoldfastError, match=message):
            run_recipe(load("quickstart", **SMOKE, overrides=overrides), folder=tmp_path / "new", quiet=True)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("name", ["model.safetensors", "checkpoints", "pictures", "report.html"])
    def test_somebody_elses_folder_is_not_touched(self, tmp_path, name, overwrite):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("mine")
        with pytest.raises(HoldfastError, match=f"holds {name} and was not made by Holdfast"):
            run_recipe(load("quickstart", **SMOKE), folder=tmp_path, quiet=True, overwrite=overwrite)
        assert [p.name for p in tmp_path.iterdir()] == [name]

    def test_unwritable_folder(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(HoldfastError, match="Choose another folder"):
            run_recipe(load("quickstart", **SMOKE), folder=tmp_path / "file", quiet=True)

    @pytest.mark.parametrize("damage", ["{", '{"schema_version": "0"}'])
    def test_damaged_result(self, tmp_path, damage):
        (tmp_path / "result.json").write_text(damage)
        with pytest.raises(HoldfastError, match="damaged or of another version"):
            read_result(tmp_path)

    def test_an_immunization_that_ends_in_nan_leaves_a_result_that_says_so(self, tmp_path):
        settings = ["defense.loss=ce-ascent", "defense.guard=false", "defense.clip=null", "defense.suppression_lr=1e30",
                    "pretrain.steps=5", *ALONE]  # fmt: skip
        result = run_recipe(load("quickstart", **SMOKE, overrides=settings), folder=tmp_path, device="cpu", quiet=True)
        assert not result.immunization.completed
        assert result.audit.verdict.label == "invalid"
        assert result.audit.benign.immunized is None
        assert any(r.code == "no-finite-score" and "immunized" in r.names for r in result.audit.verdict.reasons)
        assert read_result(tmp_path).audit == result.audit
        assert "Invalid" in (tmp_path / "report.html").read_text()

    @pytest.mark.usefixtures("brief_look")
    @pytest.mark.parametrize(("scale", "battery"), [("smoke", "quick-v1"), ("paper", "probes-v1")])
    def test_real_weights_start_at_every_scale(self, few_data, tmp_path, scale, battery):
        """On a few real images: the weights are real ones, too."""
        quick = ["audit.budgets=[0,1]", "audit.seeds=1", "audit.shots=2", f"audit.battery={battery}", *ALONE,
                 "defense.iterations=1", "defense.steps=1", "defense.batch_sizes=[20]",
                 "benign.test_limit=20", "restricted.test_limit=20",
                 "benign.train_limit=40", "restricted.train_limit=80"]  # fmt: skip
        recipe = load("quickstart-cifar", scale=scale, overrides=quick)
        result = run_recipe(recipe, folder=tmp_path, data_dir=few_data, device="cpu", quiet=True)
        assert result.audit.benign.original > 0.7
        assert result.provenance.models["original"].parameters == 269_722


SETTINGS = [
    "run", "quickstart", "--scale", "smoke", "--device", "cpu", "--set", "defense.iterations=16",
    "--set", "defense.guard_every=1", "--set", "audit.side_effects=false",
    "--set", "defense.max_benign_drop=1.0", "--set", "pretrain.steps=5", "--set", "benign.test_limit=60",
    "--set", "restricted.test_limit=60",
]  # fmt: skip


def start(folder):
    return children.start(*SETTINGS, "--out", folder)


def test_ctrl_c_and_kill_leave_a_folder_that_is_resumed_to_the_same_numbers(tmp_path, capsys):
    """Ctrl-C in the middle of the immunization, kill -9 of the audit; the third start ends as if nothing had happened.

    For kill -9 in the middle of an immunization see the protocols' tests.
    """
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    state, trials = (
        folder / "checkpoints" / "immunization.safetensors",
        folder / "checkpoints" / "trials.jsonl",
    )

    process = start(folder)
    wait_for(state.exists, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert not trials.exists()

    process = start(folder)
    wait_for(lambda: trials.exists() and trials.read_text().count("\n") > 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists()
    kept = trials.read_text().count("\n")

    for each in (folder, whole):
        with pytest.raises(SystemExit) as ended:
            main([*SETTINGS, "--out", str(each)])
        assert ended.value.code == 0
    assert f"{kept - 1} done before" in capsys.readouterr().err
    assert numbers(folder) == numbers(whole)


def test_sigterm_leaves_a_resumable_folder_and_a_ctrl_c_that_is_ignored_stays_ignored(tmp_path):
    """As under `nohup`, or in the background of a script."""
    state = tmp_path / "x" / "checkpoints" / "immunization.safetensors"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            children.command(*SETTINGS, "--out", tmp_path / "x"),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(state.exists, process)
    process.send_signal(signal.SIGINT)
    seen = state.stat().st_mtime_ns
    wait_for(lambda: state.stat().st_mtime_ns != seen, process)  # the round after the signal was finished, too
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143
    assert "Terminated. Finished results are kept; the same command continues from there." in output
    assert "Traceback" not in output


class TestVerbs:
    def test_immunize_and_audit_use_disjoint_halves(self, restricted):
        defender_data, adversary_data = halves(restricted)
        rows = [set(map(bytes, t._x["train"].numpy())) for t in (defender_data, adversary_data)]
        assert not rows[0] & rows[1]  # not even the few identical images that digits holds
        assert defender_data.size("train") + adversary_data.size("train") == restricted.size("train")

    @pytest.fixture
    def seen(self, monkeypatch):
        """What defense and adversaries got: hashes of the restricted data, and the number of threads."""
        found = {"defense": set(), "adversaries": set(), "threads": set()}
        make, attack = holdfast.Sophon.immunize, holdfast.Adversary.attack

        def immunize(self, model, benign, restricted, *, run):
            found["defense"].add(restricted.facts().sha256)
            found["threads"].add(torch.get_num_threads())
            return make(self, model, benign, restricted, run=run)

        def attacked(self, model, task, **settings):
            found["adversaries"].add(task.facts().sha256)
            found["threads"].add(torch.get_num_threads())
            return attack(self, model, task, **settings)

        monkeypatch.setattr(holdfast.Sophon, "immunize", immunize)
        monkeypatch.setattr(holdfast.Adversary, "attack", attacked)
        return found

    def test_each_side_gets_its_own_half_and_the_threads(self, trained, benign, restricted, seen):
        defender_data, adversary_data = (half.facts().sha256 for half in halves(restricted))
        tasks, before = {"benign": benign, "restricted": restricted, "threads": 3}, torch.get_num_threads()
        holdfast.immunize(trained, **tasks, iterations=1, steps=1, batch_sizes=(20,))
        assert seen == {"defense": {defender_data}, "adversaries": set(), "threads": {3}}
        seen["threads"].clear()
        holdfast.audit(trained, original=trained, **tasks, budgets=(0, 1), seeds=1, stacked=False, side_effects=False)
        assert seen == {"defense": {defender_data}, "adversaries": {adversary_data}, "threads": {3}}
        assert torch.get_num_threads() == before != 3

    def test_each_side_gets_its_own_half_and_the_threads_in_a_recipe(self, tmp_path, seen):
        task = load_task("digits[7-9]@test_limit=20")
        defender_data, adversary_data = (half.facts().sha256 for half in halves(task))
        few = ["benign.test_limit=20", "restricted.test_limit=20", "pretrain.steps=1", "defense.iterations=1",
               "defense.steps=1", "audit.seeds=1", "audit.budgets=[0,1]"]  # fmt: skip
        recipe = load("quickstart", **SMOKE, overrides=[*ALONE, *few, "audit.shots=null", "threads=3"])
        result = run_recipe(recipe, folder=tmp_path, device="cpu", quiet=True)
        assert seen == {"defense": {defender_data}, "adversaries": {adversary_data}, "threads": {3}}
        assert result.provenance.threads == 3

    def test_folder_keeps_model_and_results(self, trained, benign, restricted, tmp_path):
        options = {"iterations": 2, "steps": 2, "batch_sizes": (20,)}
        made = holdfast.immunize(
            trained, benign=benign, restricted=restricted, folder=tmp_path / "made", device="cpu", **options
        )
        again = holdfast.load_model(str(tmp_path / "made" / "model.safetensors"), benign)
        assert again.facts().sha256 == made.facts().sha256
        result = holdfast.audit(
            again, original=trained, benign=benign, restricted=restricted, budgets=(0, 2), seeds=1, shots=2,
            device="cpu", folder=tmp_path / "audit",
        )  # fmt: skip
        stored = read_result(tmp_path / "audit")
        assert stored.audit == result
        assert stored.job == "audit"
        assert (tmp_path / "audit" / "report.html").stat().st_size > 10_000

    def test_the_record_is_on_the_model_and_on_its_copies(self, trained, benign, restricted, tmp_path):
        made = holdfast.immunize(trained, benign=benign, restricted=restricted, folder=tmp_path, **BRIEF)
        record = made.clone().immunization
        assert record == made.immunization == read_result(tmp_path).immunization
        assert (record.defense, record.completed, record.changed, record.finite) == ("sophon", True, True, True)
        assert record.nothing is None
        assert pickle.loads(pickle.dumps(made)).immunization == record
        assert trained.immunization is None
        assert made.fresh().immunization is None
        again = holdfast.load_model(str(tmp_path / "model.safetensors"), benign)
        assert again.immunization is None  # a released file does not tell how it was made
        made.load(tmp_path / "model.safetensors")
        assert made.immunization is None

    def test_a_guard_that_gave_up_is_seen(self, trained, benign, restricted, tmp_path, monkeypatch):
        monkeypatch.setitem(LOSSES, "ice", lambda z, y: inverse_cross_entropy(z, y) * math.nan)
        giving_up = Sophon(iterations=50, steps=1, batch_sizes=(20,), max_rollbacks=1)
        made = holdfast.immunize(trained, benign=benign, restricted=restricted, defense=giving_up, folder=tmp_path)
        assert not made.immunization.completed
        assert made.immunization.changed is False
        assert "gave up after 1 times" in made.immunization.events[-1].message
        assert read_result(tmp_path).immunization == made.immunization
        page = (tmp_path / "report.html").read_text()
        assert "There is no immunized model" in page
        assert "Nothing was immunized: the weights are the original&#39;s, unchanged." in page
        ending = dataclasses.replace(giving_up, guard=False)
        ruined = holdfast.immunize(trained, benign=benign, restricted=restricted, defense=ending)
        assert not ruined.immunization.completed
        assert ruined.immunization.nothing is None or "not finite" in ruined.immunization.nothing

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"defense": Sophon}, r"expected an instance, such as Sophon\(\)"),
            ({"defense": Sophon(), "steps": 3}, "steps: settings go with the name of a defense"),
            ({"defense": 3}, "defense is 3; expected a name or a Defense"),
            ({"steps": True}, "steps is true; expected a number"),
            ({"steps": "null"}, "steps is 'null'"),
            ({"benign": "digits[0-4]"}, r"benign is 'digits\[0-4\]'; expected a task: holdfast.load_task"),
            ({"model": torch.nn.Linear(2, 2)}, "model is Linear; expected a SplitModel"),
            ({"seed": -1}, "seed is -1; expected a whole number from 0 on"),
            ({"seed": 1.5}, "seed is 1.5"),
            ({"seed": True}, "seed is True"),
            ({"seed": None}, "seed is None"),
            ({"threads": 0}, "threads is 0; expected a whole number from 1 to"),
            ({"threads": "2"}, "threads is '2'"),
            ({"device": None}, "Device None is not a name"),
            ({"folder": ""}, "folder is ''; expected a path"),
            ({"folder": 3}, "folder is 3; expected a path"),
        ],
    )
    def test_bad_arguments_of_immunize(self, trained, benign, restricted, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        arguments = {"model": trained, "benign": benign, "restricted": restricted, "folder": "out", **options}
        with pytest.raises(HoldfastError, match=message):
            holdfast.immunize(arguments.pop("model"), **arguments)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budgets": "0,5"}, "budgets is '0,5'"),
            ({"budgets": [0, 2.5]}, "budgets.1 is 2.5"),
            ({"budgets": [0, True]}, "budgets.1 is true"),
            ({"budgets": [0, -5]}, "ascending, the first 0"),
            ({"seeds": True}, "seeds is true; expected a number"),
            ({"seeds": -1}, "seeds is -1"),
            ({"shots": "null"}, "shots is 'null'"),
            ({"threads": 0}, "threads is 0"),
            ({"executor": "serail"}, "did you mean 'serial'"),
            ({"executor": None}, "executor is None"),
            ({"trials": 5}, "trials is 5, and quick-v1 is not a search"),
            ({"thresholds": {"side_effects": False}}, "Unknown key 'thresholds.side_effects'"),
            ({"original": None}, "original is NoneType; expected a SplitModel"),
            ({"transfer": "digits"}, "transfer is 'digits'; expected a task"),
        ],
    )
    def test_bad_arguments_of_audit(self, trained, benign, restricted, tmp_path, options, message):
        arguments = {"original": trained, "benign": benign, "restricted": restricted, **options}
        with pytest.raises(HoldfastError, match=message):
            holdfast.audit(trained, folder=tmp_path / "out", **arguments)
        assert not list(tmp_path.iterdir())

    def test_numbers_of_numpy_lists_and_paths_are_what_they_say(self, trained, benign, restricted, tmp_path):
        made = holdfast.audit(
            trained, original=trained, benign=benign, restricted=restricted, budgets=np.array([0, 1]),
            seeds=np.int64(1), shots=2.0, seed=np.int64(2**40), threads=np.int32(1), device=torch.device("cpu"),
            folder=str(tmp_path / "a"), side_effects=False, stacked=True, reported=np.float32(0.5),
        )  # fmt: skip
        assert (made.budgets, made.seeds, made.shots, made.reported) == ([0, 1], [0], 2, 0.5)
        assert read_result(tmp_path / "a").seed == 2**40

    def test_bad_options(self, trained, benign, restricted):
        with pytest.raises(HoldfastError, match="budgets"):
            holdfast.audit(trained, original=trained, benign=benign, restricted=restricted, budgets=(1,))
        with pytest.raises(HoldfastError, match="did you mean 'seeds'"):
            holdfast.audit(trained, original=trained, benign=benign, restricted=restricted, seedz=1)
        with pytest.raises(HoldfastError, match="did you mean 'steps'"):
            holdfast.immunize(trained, benign=benign, restricted=restricted, stepz=1)

    def test_unknown_device(self, trained, benign, restricted):
        with pytest.raises(HoldfastError, match="Device 'gpu9'"):
            holdfast.immunize(trained, benign=benign, restricted=restricted, device="gpu9")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu(self, trained, benign, restricted, tmp_path):
        recipe = load("quickstart", scale="smoke")
        result = run_recipe(recipe, folder=tmp_path, device="cuda", quiet=True)
        assert result.provenance.device.startswith("cuda")

    def test_job_file_is_plain(self, brief_folder):
        job = json.loads((brief_folder / "job.json").read_text())
        assert job["kind"] == "run"
        assert job["recipe"]["title"].startswith("Quickstart")

    def test_public_names_exist(self):
        for name in holdfast.__all__:
            assert getattr(holdfast, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = holdfast.nothing

    def test_embedded_data_needs_no_folder(self):
        os.environ.pop("HOLDFAST_DATA", None)
        assert load_task("digits").size("test") == 445
