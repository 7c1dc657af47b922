from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import holdfast as holdfast_package
from holdfast.auditing import audit as auditing
from holdfast.cli.main import COMMANDS, _parser, main
from holdfast.losses import LOSSES, inverse_cross_entropy
from holdfast.results import ImmunizationResult

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("HOLDFAST_DATA", "COLUMNS")}


def holdfast(*arguments):
    command = [sys.executable, "-m", "holdfast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300)


def inside(capsys, *arguments):
    """The same in this process, without the seconds that a new one needs to import torch."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, ended.value.code, captured.out, captured.err)


def refused(done, *words):
    """Bad input: exit code 2, one message that holds the words, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained, benign):
    """A saved model, an archive of arrays of the same tasks, and things that are neither."""
    folder = tmp_path_factory.mktemp("files")
    trained.save(folder / "original.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trained.fresh().save(folder / "fresh.safetensors")
    torch.save(trained.network.state_dict(), folder / "pickle.pt")
    return folder


@pytest.fixture
def unseen(monkeypatch):
    """Red flags are not looked for, where a test is about something else."""
    monkeypatch.setattr(auditing, "red_flags", lambda *_, **__: [])


class TestHelp:
    def test_lists_the_commands_quickly(self):
        done = holdfast("--help")
        assert done.returncode == 0
        assert all(f"    {name} " in done.stdout for name in COMMANDS)

    @pytest.mark.parametrize("words", [["--help"], ["audit", "--help"], ["recipes"]])
    def test_what_needs_no_torch_does_not_wait_for_it(self, words):
        code = (
            "import sys, holdfast.cli.main as c\ntry: c.main(sys.argv[1:])\n"
            "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "quickstart" in done.stdout or "usage" in done.stdout

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_option_is_explained(self, command, capsys):
        done = inside(capsys, command, "--help")
        assert done.returncode == 0
        options = [w for w in done.stdout.split() if w.startswith("--")]
        assert options
        assert not [o for o in options if "_" in o]
        for action in _parser()._subcommands_action._name_parser_map[command]._actions:
            assert action.help, action

    def test_version(self):
        from importlib.metadata import version

        assert version("holdfast") in holdfast("--version").stdout

    def test_no_command(self):
        done = holdfast()
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


class TestRun:
    @pytest.mark.trains
    def test_smoke_leaves_a_folder_and_prints_the_verdict(self, tmp_path, capsys, monkeypatch):
        brief = ("--set", "audit.shots=1", "--set", "audit.side_effects=false", "--set", "pretrain.steps=10")
        monkeypatch.chdir(tmp_path)
        Path("own.yaml").write_text(inside(capsys, "recipes", "quickstart").stdout)
        done = inside(capsys, "run", "own.yaml", "--scale", "smoke", *brief)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "runs" / "own"
        assert {"result.json", "report.html", "model.safetensors"} <= {p.name for p in folder.iterdir()}
        assert "Verdict: " in done.stdout
        assert "Threat model: An adversary with 3 labelled samples" in done.stdout
        assert "runs/own/report.html" in done.stdout

        again = inside(capsys, "run", "own.yaml", "--scale", "smoke", *brief)
        assert again.returncode == 0, again.stderr
        assert "already complete" in again.stderr
        assert again.stdout == done.stdout

        gated = inside(capsys, "run", "own.yaml", "--scale", "smoke", *brief, "--gate")
        assert gated.returncode in (0, 3, 4)
        label = gated.stdout.split("Verdict: ")[1].split(".")[0]
        assert gated.returncode == {"RESISTS": 0, "PARTIAL": 3, "FAILS": 3, "INVALID": 4}[label]

        report = folder / "report.html"
        report.unlink()
        assert inside(capsys, "report", folder).returncode == 0
        assert report.exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["quickstrat"], ["did you mean 'quickstart'"]),
            (["quickstart", "--set", "defense.stpes=3"], ["did you mean 'steps'"]),
            (["quickstart", "--set", "nonsense"], ["has no '='"]),
            (["quickstart", "--scale", "huge"], ["huge"]),
            (["quickstart", "--seed", "one"], ["one"]),
            (["quickstart", "--seed", "-1"], ["seed"]),
            (["quickstart", "--device", "tpu9"], ["Device 'tpu9' cannot be used here"]),
            (["quickstart", "--sed", "1"], ["--sed"]),
            (["quickstart", "--set", "benign.data=./mine.npz"], ["'./mine.npz'", "does not exist"]),
            (["quickstart", "--set", "defense={name: [x]}"], ["Unknown defense"]),
            (["quickstart", "--set", "audit.seeds=2020-13-45"], ["audit.seeds is '2020-13-45'"]),
            (["quickstart", "--set", "threads=1000000"], ["threads is 1000000"]),
            (["quickstart", "--out", "a\0b"], ["Cannot write to", "null"]),
            (["quickstart", "--out", ""], ["--out is empty; give it a value, or leave it out"]),
            (["quickstart", "--data-dir="], ["--data-dir is empty"]),
            (["quickstart", "--set", "kind=studdy"], ["Unknown kind 'studdy': did you mean 'study'"]),
            (["quickstart", "--set", "scales.smoke={}"], ["--set of scales has no effect"]),
            (["quickstart", "--seed", "1", "--set", "seed=2"], ["--seed 1 and --set seed=2 are both given"]),
            (["condition/house-prices", "--gate"], ["--gate: a study has no verdict"]),
            (["sophon/stability", "--gate"], ["--gate: a protocol has no verdict"]),
            (["sophon/stability", "--reuse", "runs/sophon/stability"], ["is the run's own folder"]),
            (["quickstart", "--data-dir", "nowhere"], ["'nowhere' (from --data-dir) does not exist"]),
        ],
    )
    def test_bad_input(self, arguments, words, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        refused(inside(capsys, "run", *arguments), *words)
        assert not (tmp_path / "runs").exists()

    def test_unwritable_output(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        refused(inside(capsys, "run", "quickstart", "--out", tmp_path / "file" / "x"), "Cannot write to")
        refused(inside(capsys, "run", "quickstart", "--out", tmp_path / "file"), "it is a file, not a folder")


class TestImmunizeAndAudit:
    COMMON = ("--benign", "digits[0-4]", "--restricted", "digits[5-9]", "--device", "cpu")

    def test_immunize_writes_a_model_that_audit_takes(self, files, tmp_path, capsys, unseen):
        brief = ("--set", "iterations=2", "--set", "steps=2", "--set", "batch_sizes=[20]")
        done = inside(
            capsys, "immunize", files / "original.safetensors", *self.COMMON, "--out", tmp_path / "made", *brief
        )
        assert done.returncode == 0, done.stderr
        made = tmp_path / "made" / "model.safetensors"
        audit = ("--original", files / "original.safetensors", "--budgets", "0,5", "--seeds", "1", "--shots", "2")
        done = inside(capsys, "audit", made, *audit, *self.COMMON, "--out", tmp_path / "audit")
        assert done.returncode in (0, 3, 4), done.stderr
        assert "5 steps" in done.stdout

    def test_a_diffusers_folder_is_immunized_and_the_folder_that_comes_out_audited(
        self, denoiser, tmp_path, capsys, unseen
    ):
        folder = denoiser.save_pretrained(tmp_path / "original")
        tasks = (
            "--benign", "digits[0-4]@kind=denoising,test_limit=8", "--device", "cpu",
            "--restricted", "digits[5-9]@kind=denoising,test_limit=8",
        )  # fmt: skip
        brief = ("--set", "iterations=1", "--set", "steps=1", "--set", "batch_sizes=[10]")
        done = inside(capsys, "immunize", folder, *tasks, "--out", tmp_path / "made", *brief)
        assert done.returncode == 0, done.stderr
        assert "Written for diffusers" in done.stdout + done.stderr
        made = json.loads((tmp_path / "made" / "result.json").read_text())
        assert made["immunization"]["config"]["loss"] == "dos"
        done = inside(
            capsys, "audit", tmp_path / "made" / "pipeline", *tasks,
            "--original", tmp_path / "made" / "model.safetensors",
            "--budgets", "0,1", "--seeds", "1", "--shots", "10", "--set", "side_effects=false", "--out",
            tmp_path / "audit",
        )  # fmt: skip
        assert done.returncode == 4, done.stderr  # one seed: invalid
        assert "skill in %" in done.stdout
        result = json.loads((tmp_path / "audit" / "result.json").read_text())
        assert (
            result["provenance"]["models"]["original"]["sha256"] == made["provenance"]["models"]["immunized"]["sha256"]
        )
        assert result["audit"]["unit"] == "skill"
        trial = ("--adversary", "direct+all adam 0.001 b50", "--role", "immunized", "--seed", "0")
        assert "The same scores" in inside(capsys, "replay", tmp_path / "audit", *trial).stdout
        assert "best linear denoiser" in inside(capsys, "card", tmp_path / "audit").stdout

    def test_denoisers_and_classifiers_are_not_mixed_up(self, denoiser, tmp_path, capsys):
        folder = denoiser.save_pretrained(tmp_path / "original")
        done = inside(capsys, "immunize", folder, *self.COMMON, "--out", tmp_path / "made")
        refused(
            done,
            "is a denoiser: it returns one noise a sample, and the classification task 'digits[0-4]'",
            "kind=denoising",
        )
        done = inside(
            capsys, "feasibility", "--benign", "digits[0-4]@kind=denoising", "--restricted",
            "digits[5-9]@kind=denoising", "--out", tmp_path / "f",
        )  # fmt: skip
        refused(done, "the denoising task", "For denoisers there are sophon and trajectory-erasure")

    def test_exit_3_where_the_model_does_not_resist(self, files, tmp_path, capsys, unseen):
        """The original, audited as if it were immunized, on samples so few that it has an advantage."""
        done = inside(
            capsys, "audit", files / "original.safetensors", "--original", files / "original.safetensors", *self.COMMON,
            "--out", tmp_path, "--budgets", "[0,2]", "--seeds", "2", "--shots", "5", "--set", "side_effects=false",
        )  # fmt: skip
        assert done.returncode in (3, 4), done.stderr
        assert ("Verdict: FAILS" in done.stdout) == (done.returncode == 3)

    def test_audit_of_somebodys_code(self, files, tmp_path, monkeypatch, capsys, unseen):
        """A network that hides the gradient, beside the file that it was made from."""
        (tmp_path / "sham.py").write_text(
            "import torch\nfrom torch import nn\nfrom safetensors.torch import load_file\n"
            "from holdfast.models.families.builtin import CNN\n\n"
            "class Sham(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.inner = CNN((1, 8, 8), 5)\n"
            "    def forward(self, x):\n"
            "        return (None, self.inner.head(self.inner.body(x * 2 - 1).detach()))\n\n"
            "def make():\n"
            "    sham = Sham()\n"
            f"    sham.inner.load_state_dict(load_file({str(files / 'original.safetensors')!r}))\n"
            "    return sham.requires_grad_(False)\n"
        )
        audit = (
            "--original", files / "original.safetensors", "--budgets", "0,2", "--seeds", "1", "--shots", "2",
            "--set", "side_effects=false",
        )  # fmt: skip
        monkeypatch.chdir(tmp_path)
        done = inside(capsys, "audit", "sham.py:make", *audit, *self.COMMON, "--out", "audit")
        assert done.returncode in (3, 4), done.stderr
        result = json.loads((tmp_path / "audit" / "result.json").read_text())["audit"]
        assert result["benign"]["immunized"] == pytest.approx(result["benign"]["original"], abs=1e-6)
        head = ("--head", "inner.haed")
        done = inside(capsys, "audit", "sham.py:make", *head, *audit, *self.COMMON, "--out", "other")
        refused(done, "no layer 'inner.haed' to use as the head", "'inner.head'")

    def test_exit_4_where_the_audit_proves_nothing(self, files, tmp_path, capsys):
        """With settings that have no option of their own."""
        done = inside(
            capsys, "audit", files / "fresh.safetensors", "--original", files / "original.safetensors", *self.COMMON,
            "--out", tmp_path, "--budgets", "[0,1]", "--seeds", "1", "--shots", "2", "--set", "side_effects=false",
            "--set", "stacked=no", "--set", "thresholds.tolerance=0.01",
        )  # fmt: skip
        assert done.returncode == 4, done.stderr
        assert "Verdict: INVALID" in done.stdout
        assert "broken model is not a safe one" in done.stdout
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["audit"]["side_effects"] == []
        assert result["recipe"]["audit"]["stacked"] is False
        assert result["audit"]["verdict"]["thresholds"]["tolerance"] == 0.01

    def test_exit_3_where_nothing_was_immunized(self, files, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(LOSSES, "ice", lambda z, y: inverse_cross_entropy(z, y) * math.nan)
        brief = ("--set", "steps=1", "--set", "batch_sizes=[20]", "--set", "max_rollbacks=1")
        done = inside(capsys, "immunize", files / "original.safetensors", *self.COMMON, "--out", tmp_path, *brief)
        assert done.returncode == 3, done.stderr
        assert "Nothing was immunized: the weights are the original's, unchanged." in done.stdout
        assert "gave up after 1 times" in done.stdout
        assert "Immunized model:" not in done.stdout
        made = json.loads((tmp_path / "result.json").read_text())["immunization"]
        assert (made["changed"], made["completed"], made["finite"]) == (False, False, True)
        del made["changed"], made["finite"]  # as an earlier version wrote it
        assert ImmunizationResult.model_validate(made).nothing is None

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (("--set", "side_effects=maybe"), ["side_effects is 'maybe'"]),
            (("--set", "side_efects=false"), ["setting for --set: 'side_efects'", "did you mean 'side_effects'"]),
            (("--set", "seeds=3"), ["--set seeds: use the option --seeds instead"]),
            (("--set", "original_weights=x"), ["use the option --original-weights"]),
            (("--set", "max_advantag=0.03"), ["did you mean 'max_advantage'"]),
            (("--set", "thresholds.tolerance=0.01", "--set", "tolerance=0.01"), ["names a threshold twice"]),
            (("--set", "tolerance=0.01", "--set", "tolerance=0.02"), ["--set tolerance is given twice"]),
            (("--trials", "9"), ["trials is 9, and quick-v1 is not a search"]),
            (("--transfer", "digits", "--set", "side_effects=off"), ["a transfer task, but side_effects is off"]),
        ],
    )
    def test_bad_settings_of_audit(self, files, tmp_path, capsys, more, words):
        original = files / "original.safetensors"
        done = inside(capsys, "audit", original, "--original", original, *self.COMMON, "--out", tmp_path / "o", *more)
        refused(done, *words)
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (("--set", "defense=ntl"), ["--set defense: use the option --defense instead"]),
            (("--set", "stpes=3"), ["did you mean 'steps'"]),
            (("--set", "steps=true"), ["steps is true; expected a number"]),
            (("--set", "steps=1", "--set", "steps=2"), ["--set steps is given twice"]),
            (("--set", "iterations=[1"), ["--set 'iterations=[1'", "not valid YAML"]),
            (("--set", "name="), ["choose the defense with --defense"]),
            (("--threads", "1000000"), ["threads is 1000000"]),
            (("--threads", "0"), ["threads is 0"]),
        ],
    )
    def test_bad_settings_of_immunize(self, files, tmp_path, capsys, more, words):
        out = tmp_path / "out"
        done = inside(capsys, "immunize", files / "original.safetensors", *self.COMMON, "--out", out, *more)
        refused(done, *words)
        assert not (out / "model.safetensors").exists()

    def test_a_huge_seed_is_a_seed(self, files, tmp_path, capsys):
        brief = ("--set", "iterations=1", "--set", "steps=1", "--set", "batch_sizes=[20]", "--seed", 10**30)
        done = inside(capsys, "immunize", files / "original.safetensors", *self.COMMON, "--out", tmp_path, *brief)
        assert done.returncode == 0, done.stderr

    def test_a_damaged_job_file(self, files, tmp_path, capsys):
        for content in (b"\xff\xfe", b"[1]", b"{", b"[" * 100_000):
            (tmp_path / "job.json").write_bytes(content)
            done = inside(capsys, "immunize", files / "original.safetensors", *self.COMMON, "--out", tmp_path)
            refused(done, "job.json' is damaged")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model": "no.safetensors"}, ["does not exist"]),
            ({"model": "{files}/pickle.pt"}, ["is a pickle", "refused"]),
            ({"model": "cnn"}, ["architecture without weights"]),
            ({"model": "resnet99"}, ["Unknown model 'resnet99'"]),
            ({"benign": "digits"}, ["for 5 classes", "has 10"]),
            ({"benign": "{files}/labels.npz"}, ["y_train holds label 9"]),
            ({"restricted": "{files}/nan.npz"}, ["NaN or infinite"]),
            ({"restricted": "{files}/one.npz"}, ["one class only"]),
            ({"restricted": "{files}/empty.npz"}, ["split is empty"]),
            ({"restricted": "{files}/wide.npz"}, ["cannot take the inputs", "image_size"]),
            ({"battery": "strong-v9"}, ["Unknown battery 'strong-v9'"]),
            ({"budgets": "[1,2]"}, ["ascending, the first 0"]),
            ({"budgets": "0,some"}, ["'0,some'", "whole numbers with commas"]),
            ({"shots": "5000"}, ["lower `shots`"]),
        ],
    )
    def test_bad_input(self, files, tmp_path, capsys, change, words):
        image = np.zeros((12, 8, 8), np.uint8)
        label = np.arange(12) % 5
        arrays = {
            "labels": (image, np.where(label == 4, 9, label), ["a", "b", "c", "d", "e"]),
            "nan": (np.full((12, 64), np.nan), label, None),
            "one": (image, np.zeros(12, int), None),
            "empty": (image[:0], label[:0], None),
            "wide": (np.random.default_rng(0).integers(0, 9, (60, 9, 9, 3), np.uint8), np.arange(60) % 5, None),
        }
        for name, (x, y, names) in arrays.items():
            extra = {"class_names": names} if names else {}
            np.savez(files / f"{name}.npz", x_train=x, y_train=y, x_test=x, y_test=y, **extra)
        arguments = {
            "model": "{files}/original.safetensors", "original": "{files}/original.safetensors",
            "benign": "digits[0-4]", "restricted": "digits[5-9]", "battery": "quick-v1",
            "budgets": "[0,1]", "shots": "2", **change,
        }  # fmt: skip
        filled = {k: v.format(files=files) for k, v in arguments.items()}
        model = filled.pop("model")
        options = [part for key, value in filled.items() for part in (f"--{key}", value)]
        done = inside(capsys, "audit", model, *options, "--seeds", "1", "--out", tmp_path / "out")
        refused(done, *words)
        assert not (tmp_path / "out" / "result.json").exists()

    def test_another_jobs_folder_is_kept(self, files, brief_folder, capsys):
        before = (brief_folder / "result.json").read_bytes()
        done = inside(capsys, "immunize", files / "original.safetensors", *self.COMMON, "--out", brief_folder)
        refused(done, "holds another job", "--out")
        assert (brief_folder / "result.json").read_bytes() == before


class TestOthers:
    def test_recipes(self, capsys):
        assert "quickstart" in inside(capsys, "recipes").stdout

    def test_bad_folders(self, tmp_path, capsys):
        refused(inside(capsys, "report", tmp_path), "holds no result.json")
        refused(inside(capsys, "report", tmp_path / "nowhere"), "No folder at", "it does not exist")
        refused(inside(capsys, "recipes", "nothing"), "Unknown recipe 'nothing'")

    def test_options_that_would_do_nothing(self, brief_folder, tmp_path, capsys):
        check = ("card", tmp_path, "--check", brief_folder / "model.safetensors")
        refused(inside(capsys, *check, "--out", tmp_path / "README.md"), "--out has no effect with --check")
        refused(inside(capsys, *check, "--weights", "x"), "--weights has no effect with --check")
        tasks = ("--benign", "digits[0-4]", "--restricted", "digits[5-9]", "--out", tmp_path)
        refused(inside(capsys, "feasibility", *tasks, "--head", "fc"), "--head needs a MODEL")
        refused(inside(capsys, "replay", brief_folder, "--threads", "0"), "threads is 0")
        refused(inside(capsys, "replay", brief_folder, "--adversary", ""), "--adversary is empty")

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ((), "the same command continues"),
            (("--overwrite",), "the same command without --overwrite continues"),
        ],
    )
    def test_interrupted(self, tmp_path, capsys, monkeypatch, more, words):
        def stopped(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("holdfast.experiments.runner.run_recipe", stopped)
        done = inside(capsys, "run", "quickstart", "--out", tmp_path, *more)
        assert done.returncode == 130
        assert words in done.stderr

    def test_a_recipe_with_a_key_twice(self, tmp_path, capsys):
        text = (Path(holdfast_package.__file__).parent / "recipes" / "quickstart.yaml").read_text()
        (tmp_path / "own.yaml").write_text(f"{text}\nseed: 1\n")
        line = text.splitlines().index(next(x for x in text.splitlines() if x.startswith("seed:"))) + 1
        refused(inside(capsys, "run", tmp_path / "own.yaml"), "'seed' is given twice", f"in line {line}")

    def test_what_was_not_foreseen_is_one_message(self, capsys, monkeypatch):
        def fail():
            raise KeyError("surprise")

        monkeypatch.setattr("holdfast.runtime.documents.recipe_names", fail)
        monkeypatch.delenv("HOLDFAST_TRACEBACK", raising=False)
        refused(inside(capsys, "recipes"), "unexpected KeyError", "HOLDFAST_TRACEBACK=1")
        monkeypatch.setenv("HOLDFAST_TRACEBACK", "1")
        with pytest.raises(KeyError):
            main(["recipes"])

    def test_a_closed_pipe_is_no_error(self):
        done = subprocess.run(
            f"{sys.executable} -m holdfast recipes | true", shell=True, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr
