from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import load_model
from holdfast.results import RunResult, read_result
from holdfast.runtime.distributed import ProcessGroup, _launched, alone, outcome, process_group
from holdfast.tasks import load_task

HERE = Path(__file__).parents[1]

FAILS = """
from holdfast.runtime.distributed import process_group
group = process_group()
if group.rank == 1:
    raise RuntimeError("the second process fails alone")
group.gather("waits for the other")
"""


def launch(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Lets two processes run a script; a port is found by the launcher."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(script), *arguments,
    ]  # fmt: skip
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    surroundings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("team")
    done = launch(HERE / "teamwork.py", str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], done.stdout


@pytest.fixture
def both(worked: tuple[Path, list[dict[str, Any]], str]) -> list[dict[str, Any]]:
    return worked[1]


@pytest.fixture(scope="module")
def recipe_result(worked: tuple[Path, list[dict[str, Any]], str]) -> RunResult:
    return read_result(worked[0] / "run")


class TestTwoProcesses:
    def test_know_each_other(self, both):
        assert [found["team"] for found in both] == [[0, 2], [1, 2]]

    @pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
    def test_no_thread_outlives_the_group(self, both):
        assert [found["outlived"] for found in both] == [[], []]

    def test_the_mean_gradient_is_that_of_the_union_of_batches(self, both):
        for found in both:
            assert found["averages"]["union"]
            assert found["averages"]["differed before"]

    def test_a_gradient_that_only_one_has_counts_half_and_one_that_none_has_is_none(self, both):
        for found in both:
            assert found["averages"]["partly"] == [[2.0, 2.0], [0.5, 0.5], None]

    def test_statistics_are_averaged_and_weights_are_the_main_ones(self, both):
        assert both[0]["averages"]["statistics"] == both[1]["averages"]["statistics"] == [1.0, 1.0]
        first, second = (found["averages"] for found in both)
        assert first["followed"] == second["followed"] == first["own weights"] != second["own weights"]

    def test_agree_and_hear_everybody(self, both):
        for found in both:
            assert found["talks"]["agreed"] == "said by 0"
            assert found["talks"]["gathered"] == [0, 1]

    def test_raise_together(self, both):
        for found in both:
            assert found["talks"]["raised"] == "HoldfastError: rows is 1; expected at least 2."
            assert found["talks"]["job raised"].startswith("ZeroDivisionError")
            assert "another seed" in found["talks"]["other job"]

    def test_share_jobs_each_of_which_is_alone_and_one_writes(self, both):
        for found in both:
            assert found["talks"]["entries"] == {"0": 101, "1": 104, "2": 109}
            assert found["talks"]["lines"] == 4

    def test_refuse_what_would_start_others_or_take_their_device(self, both):
        for found in both:
            assert "already share the trials" in found["talks"]["workers"]
            assert "ACCELERATE_USE_CPU=true" in found["talks"]["device"]

    @pytest.mark.parametrize("what", ["pretrained", "immunized", "resumed", "ntl", "tar", "repnoise"])
    def test_hold_the_same_weights(self, both, what):
        assert both[0]["trains"][what] == both[1]["trains"][what]

    def test_learn_from_more_than_one_process_does(self, both):
        assert both[0]["trains"]["pretrained"] != both[0]["trains"]["by one"] == both[1]["trains"]["by one"]

    def test_tell_the_same_history(self, both):
        assert both[0]["trains"]["history"] == both[1]["trains"]["history"]
        assert len(both[0]["trains"]["history"]["iteration"]) == 4

    def test_a_killed_immunization_continues_to_the_same_model(self, both):
        assert both[0]["trains"]["resumed"] == both[0]["trains"]["immunized"]
        assert both[0]["trains"]["killed at"] == 1

    def test_another_number_of_processes_cannot_continue_it(self, both):
        assert all("number of processes differ" in found["trains"]["other count"] for found in both)

    def test_a_defense_that_forgets_to_average_is_found_out(self, both):
        assert all("the processes' weights differ after round" in found["trains"]["forgotten"] for found in both)

    def test_a_run_is_whole_and_says_how_many_made_it(self, worked, recipe_result):
        folder = worked[0] / "run"
        assert all(found["recipe"]["codes"] == [0, 0] for found in worked[1])
        assert recipe_result.provenance.processes == 2
        assert "in each of 2 processes" in (folder / "report.html").read_text()
        names = {p.name for p in folder.rglob("*") if p.is_file()}
        assert names == {
            "job.json", "result.json", "report.html", "model.safetensors", "original.safetensors",
            "immunization.safetensors", "trials.jsonl",
        }  # fmt: skip
        kept = [json.loads(line) for line in (folder / "checkpoints" / "trials.jsonl").read_text().splitlines()[1:]]
        assert len({line["key"] for line in kept}) == len(kept) == 8 * 3
        fits = load_model("cnn", load_task("digits[0-6]"))
        fits.load(folder / "model.safetensors")
        assert fits.facts().sha256 == recipe_result.provenance.models["immunized"].sha256

    def test_only_one_speaks(self, worked):
        assert worked[2].count("Verdict:") == 2  # once for each of the two times that the recipe was run

    def test_the_number_of_processes_is_part_of_the_job(self, worked):
        assert json.loads((worked[0] / "run" / "job.json").read_text())["processes"] == 2


def test_one_that_fails_ends_the_other(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = launch(script)
    assert done.returncode != 0
    assert "the second process fails alone" in done.stderr


def test_a_launcher_that_starts_one_where_several_were_asked_for_is_refused(monkeypatch):
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(HoldfastError, match="starts a single process, whatever N is"):
        _launched.__wrapped__()


class TestOneProcess:
    def test_is_a_team_of_itself(self):
        assert process_group() == ProcessGroup(0, 1)
        with alone():
            assert process_group() == ProcessGroup(0, 1)

    def test_changes_nothing(self):
        layer = nn.Linear(2, 2)
        layer(torch.ones(1, 2)).sum().backward()
        before = [p.grad for p in layer.parameters()]
        process_group().average_gradients(layer.parameters())
        assert all(p.grad is g for p, g in zip(layer.parameters(), before, strict=True))
        assert process_group().own("a", 1) == ("a", 1)

    def test_every_rank_draws_its_own(self):
        assert len({ProcessGroup(rank, 3).own("a") for rank in range(3)}) == 3

    def test_its_errors_are_raised_as_they_are(self):
        class StrangeError(Exception):
            pass

        def work(index):
            raise StrangeError(index)

        with pytest.raises(StrangeError):
            list(process_group().share(work, 2))

    def test_what_cannot_be_sent_is_told_in_words(self):
        class LocalError(Exception):
            pass

        def work():
            raise LocalError("seven")

        done, error = outcome(work)
        assert not done
        assert str(error) == "LocalError: seven"
