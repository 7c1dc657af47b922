"""The audit of a language model from the command line: stopped, continued and replayed to the same figures."""

from __future__ import annotations

import itertools
import json

import pytest

from holdfast.auditing import audit as auditing
from holdfast.auditing.trials import TrialContext
from holdfast.cli.main import main
from holdfast.results import read_result
from texts import WORDS, save_causal, write_rows


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Two tiny models of equal weights in folders of transformers, and two files of rows."""
    place = tmp_path_factory.mktemp("language")
    original, released = (save_causal(place / name, num_hidden_layers=1) for name in ("original", "released"))
    benign = [{"prompt": f"the {word} was", "answer": WORDS[i // 3]} for i, word in enumerate(WORDS * 2)]
    restricted = [{"prompt": f"so {word} {i} was", "answer": WORDS[i // 4]} for i, word in enumerate(WORDS * 2)]
    files = {
        part: write_rows(place / f"{part}.jsonl", rows)
        for part, rows in (("benign", benign), ("restricted", restricted))
    }
    return [
        "audit", released, "--original", original, "--benign", f"{files['benign']}@length=8",
        "--restricted", f"{files['restricted']}@length=8", "--battery", "causal-quick-v1", "--budgets", "0,1",
        "--seeds", "1", "--set", "side_effects=false", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip


def test_interrupted_and_continued_to_the_same_figures(command, tmp_path, capsys, monkeypatch):
    """In the middle of the attacks; the second start computes the missing ones alone."""
    monkeypatch.setattr(auditing, "red_flags", lambda *_, **__: [])  # nothing of them is kept
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    trials = stopped / "checkpoints" / "trials.jsonl"
    curves, groups = TrialContext.curves, itertools.count()

    def interrupted(self, group):
        if next(groups) == 3:
            raise KeyboardInterrupt
        return curves(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(TrialContext, "curves", interrupted)
        with pytest.raises(SystemExit) as ended:
            main([*command, "--out", str(stopped)])
    assert ended.value.code == 130
    kept = trials.read_text().splitlines()
    assert len(kept) > 1
    assert not (stopped / "result.json").exists()
    for folder in (stopped, whole):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--out", str(folder)])
        assert ended.value.code in (3, 4)
    lines = trials.read_text().splitlines()
    assert lines[: len(kept)] == kept
    keys = [json.loads(line)["key"] for line in lines[1:]]
    others = (whole / "checkpoints" / "trials.jsonl").read_text().splitlines()
    assert len(kept) < len(lines) == len(others)
    assert sorted(keys) == sorted(json.loads(line)["key"] for line in others[1:])
    assert read_result(stopped).numbers() == read_result(whole).numbers()
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(stopped)])
    assert ended.value.code in (None, 0)
    capsys.readouterr()
