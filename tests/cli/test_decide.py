"""`holdfast audit --decide`: the same command goes on with more seeds."""

from __future__ import annotations

import json

import pytest
import torch

from holdfast.auditing.sequential import LEVEL
from holdfast.cli.main import main

pytestmark = pytest.mark.trains

FEW = (
    "--benign", "digits[0-4]", "--restricted", "digits[5-9]", "--battery", "quick-v1", "--budgets", "0,2",
    "--seeds", "2", "--shots", "3", "--set", "side_effects=false", "--set", "max_benign_drop=0.99",
    "--set", "min_scratch_gain=0.001", "--set", "min_benign_skill=0.01", "--device", "cpu", "--threads", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(trained, tmp_path_factory):
    """An audit of fresh weights, and the folder that it writes."""
    folder = tmp_path_factory.mktemp("decide")
    trained.save(folder / "original.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trained.fresh().save(folder / "fresh.safetensors")
    models = (folder / "fresh.safetensors", "--original", folder / "original.safetensors")
    return ["audit", *map(str, models), *FEW, "--out", str(folder / "out")], folder / "out"


def inside(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, " ".join(capsys.readouterr().out.split())


def test_more_seeds_for_an_audit_that_could_not_decide(command, capsys):
    arguments, out = command
    assert inside(capsys, *arguments)[0] == 4  # two seeds never decide
    code, shown = inside(capsys, *arguments, "--decide", "--max-seeds", "4")
    assert code in (0, 3, 4)
    assert "Seeds were added in stages: 2 looks, with 2 and 4 seeds (at most 4)." in shown
    found = json.loads((out / "result.json").read_text())["audit"]
    assert found["seeds"] == [0, 1, 2, 3]
    assert [look["seeds"] for look in found["sequential"]["looks"]] == [2, 4]
    assert found["sequential"]["looks"][0]["level"] == pytest.approx(LEVEL)  # it had been reported
    assert found["sequential"]["stopped"] in ("decided", "budget ended")
    assert inside(capsys, "replay", str(out), "--seed", "3")[0] == 0  # with those that were added at its look


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--max-seeds", "9"), "max_seeds is 9, and decide is off"),
        (("--decide", "--max-seeds", "1"), "max_seeds is 1, less than seeds (2)"),
        (("--set", "decide=true"), "use the option --decide"),
    ],
)
def test_bad_settings(command, capsys, tmp_path, more, words):
    arguments = [*command[0][:-1], str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *more])
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
