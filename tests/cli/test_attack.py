"""`holdfast attack` and `holdfast.attack`: any model, any adversary; files, resumption, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_cli import inside, refused

import holdfast
from holdfast.adversaries import DreamBooth, FineTuning, Probe, TextualInversion
from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, load_model, load_released
from holdfast.results import read_result
from holdfast.tasks.splits import halves
from holdfast.training import Strategy

KIND = "@kind=text-to-image,caption=a photo of the digit {},test_limit=20"
THREE = [
    FineTuning(Strategy("head", "all", "adam", 1e-2, 20)),
    Probe("ridge", "raw"),
    FineTuning(Strategy("direct", "lora", "adam", 1e-2, 20)),
]


def attacked(folder):
    return {p.name: sorted(f.name for f in p.iterdir()) for p in sorted((folder / "attacked").iterdir())}


class TestPython:
    def test_keeps_what_each_adversary_made(self, trained, benign, restricted, tmp_path):
        settings = {
            "restricted": restricted,
            "benign": benign,
            "battery": THREE,
            "budgets": (0, 3),
            "threads": 1,
            "device": "cpu",
        }
        curves = holdfast.attack(trained, **settings, folder=tmp_path)
        names = attacked(tmp_path)
        assert list(names.values()) == [["model.safetensors"], ["head.safetensors"], ["model.safetensors"]]
        again = load_released(str(tmp_path / "attacked" / next(iter(names)) / "model.safetensors"), None, restricted)
        half = halves(restricted)[1]
        assert half.audit_score(again) == pytest.approx(curves[0].scores[-1])
        head = load_file(tmp_path / "attacked" / list(names)[1] / "head.safetensors")
        assert {k: tuple(v.shape) for k, v in head.items()} == {
            "weight": (5, trained.head.in_features), "bias": (5,)
        }  # fmt: skip
        result = read_result(tmp_path)
        assert result.job == "attack"
        row = result.tables["attacks"].rows[0]
        assert row["adversary"] == curves[0].adversary
        assert row["3"].mean == curves[0].scores[1]
        assert row["benign after"].mean == curves[0].benign_after
        assert row["files"] == f"attacked/{next(iter(names))}/model.safetensors"
        assert result.figures["attacks"].series[curves[1].adversary] == curves[1].scores
        assert "gives no verdict" in (tmp_path / "report.html").read_text()

    def test_continues_after_a_kill_to_the_same_numbers(self, trained, benign, restricted, tmp_path, monkeypatch):
        settings = {
            "restricted": restricted,
            "benign": benign,
            "battery": THREE,
            "budgets": (0, 3),
            "threads": 1,
            "device": "cpu",
        }
        whole = holdfast.attack(trained, **settings, folder=tmp_path / "whole")
        plain, ran = FineTuning.run, []

        def killed(self, *inputs, **more):
            ran.append(self.name)
            for step, loss in enumerate(plain(self, *inputs, **more)):
                if len(ran) == 2 and step == 2:
                    raise KeyboardInterrupt
                yield loss

        monkeypatch.setattr(FineTuning, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            holdfast.attack(trained, **settings, folder=tmp_path / "again")
        assert len((tmp_path / "again" / "checkpoints" / "attacks.jsonl").read_text().splitlines()) == 3
        assert holdfast.attack(trained, **settings, folder=tmp_path / "again") == whole
        assert ran == [THREE[0].name, THREE[2].name, THREE[2].name]
        assert attacked(tmp_path / "again") == attacked(tmp_path / "whole")
        for place, (file,) in attacked(tmp_path / "whole").items():
            one, other = (load_file(tmp_path / each / "attacked" / place / file) for each in ("whole", "again"))
            assert all(torch.equal(value, other[name]) for name, value in one.items()), place
        numbers = [read_result(tmp_path / each).numbers() for each in ("whole", "again")]
        assert numbers[0] == numbers[1]

    def test_a_folder_of_another_attack_is_refused(self, trained, benign, restricted, tmp_path):
        settings = {"restricted": restricted, "battery": THREE[:1], "threads": 1, "device": "cpu", "folder": tmp_path}
        holdfast.attack(trained, **settings, budgets=(0, 1))
        with pytest.raises(HoldfastError, match="holds another job; it differs in: budgets"):
            holdfast.attack(trained, **settings, budgets=(0, 2))

    def test_those_that_cannot_start_are_named(self, trained, restricted, tmp_path):
        battery = [THREE[0], TextualInversion()]
        holdfast.attack(trained, restricted=restricted, battery=battery, budgets=(0, 1), threads=1, folder=tmp_path)
        (row,) = read_result(tmp_path).tables["not run"].rows
        assert row["adversary"] == battery[1].name
        assert "it changes captions" in row["why"]

    def test_without_a_folder_nothing_is_written(self, trained, restricted, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (curve,) = holdfast.attack(trained, restricted=restricted, battery=THREE[:1], budgets=(0, 1), threads=1)
        assert len(curve.scores) == 2
        assert curve.benign_after is None
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "words"),
        [({"battery": "adaptive-v1"}, "is a search"), ({"budgets": (5, 1)}, "ascending"), ({"shots": 0}, "shots"),
         ({"battery": "nothing"}, "Unknown battery"), ({"restricted": "digits"}, "expected a task")],
    )  # fmt: skip
    def test_bad_input(self, trained, restricted, tmp_path, change, words):
        with pytest.raises(HoldfastError, match=words):
            holdfast.attack(trained, **{"restricted": restricted, "folder": tmp_path, **change})


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("painter") / "model.safetensors"
    task = holdfast.load_task(f"digits[0-1]{KIND}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        load_model(ModelSpec(name="text-unet", options={"widths": [8]}), task).save(path)
    return path


class TestCommand:
    @pytest.mark.parametrize(
        ("more", "kind", "files"),
        [
            (("finetuning", "--set", "scope=lora"), FineTuning, ["pytorch_lora_weights.safetensors"]),
            (("dreambooth", "--set", "scope=lora-attention", "--set", "prior_images=2", "--set", "prior_steps=2"),
             DreamBooth, ["prompts.json", "pytorch_lora_weights.safetensors"]),
            (("textual-inversion", "--set", "learning_rate=0.05"), TextualInversion,
             ["learned_embeds-0.safetensors", "learned_embeds-1.safetensors", "prompts.json"]),
        ],
        ids=["lora", "dreambooth", "textual-inversion"],
    )  # fmt: skip
    def test_text_to_image(self, painter, tmp_path, capsys, more, kind, files):
        done = inside(
            capsys, "attack", painter, "--restricted", f"digits[8-9]{KIND}", "--benign", f"digits[0-1]{KIND}",
            "--out", tmp_path, "--adversary", *more, "--set", "batch_size=6", "--budgets", "0,1", "--threads", "1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Best after 1 steps" in done.stdout
        assert list(attacked(tmp_path).values()) == [files]
        (config,) = json.loads((tmp_path / "result.json").read_text())["recipe"]["adversaries"].values()
        assert holdfast.adversaries.KINDS[config["kind"]] is kind

    def test_bad_options(self, painter, tmp_path, capsys):
        common = ("attack", painter, "--restricted", f"digits[8-9]{KIND}", "--out", tmp_path)
        refused(inside(capsys, *common, "--set", "scope=lora"), "--set scope", "name its kind")
        refused(inside(capsys, *common, "--adversary", "probe", "--battery", "quick-v1"), "keep one")
        refused(inside(capsys, *common, "--adversary", "dreamboth"), "Unknown kind of adversary", "dreambooth")
        refused(inside(capsys, *common, "--adversary", "dreambooth", "--set", "shots=3"), "use the option --shots")
        refused(inside(capsys, *common, "--adversary", "dreambooth", "--set", "stepps=3"), "stepps")
