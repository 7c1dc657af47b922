from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

from children import start, wait_for
from holdfast.auditing.audit import audit
from holdfast.auditing.spec import AuditSpec
from holdfast.cli.main import main
from holdfast.errors import HoldfastError
from holdfast.experiments.linear.study import study
from holdfast.experiments.recipe import StudyRecipe
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.results import read_result
from holdfast.runtime.executors import executor
from holdfast.runtime.run import Run
from holdfast.runtime.workers import ATTEMPTS, worker_count
from holdfast.tasks import load_task
from jobs import (
    Shipped,
    Unsendable,
    dies_always,
    dies_once,
    fails,
    first_waits_for_second,
    lookup,
    shifted,
    surroundings,
    whereabouts,
)

HAS_RAY = importlib.util.find_spec("ray") is not None
with_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray: pip install holdfast[cluster]")
RAY = pytest.param("ray:2", marks=with_ray)
ELSEWHERE = ["processes:2", RAY]
EVERYWHERE = ["serial", *ELSEWHERE]


@with_ray
def test_a_ray_of_ours_is_shut_down_and_asks_nothing(capfd):
    import ray

    one = executor("ray:1")
    with one.kept():
        assert dict(one.run(pow, 2, [1, 5])) == {0: 2, 1: 32}
        session = ray.get_runtime_context().get_job_id(), ray.nodes()[0]["NodeID"]
        assert dict(one.run(pow, 3, [1, 2])) == {0: 3, 1: 9}
        assert (ray.get_runtime_context().get_job_id(), ray.nodes()[0]["NodeID"]) == session  # the same one
    assert not ray.is_initialized()
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def shared_ray():
    """Ray takes seconds to start, so most tests here share one; it is then the caller's, and left running."""
    if not HAS_RAY:
        yield None
        return
    import ray

    with executor("ray:2")._connected(2 * torch.get_num_threads()):  # a job takes as many cores as it has threads
        yield ray
        assert ray.is_initialized()


@pytest.fixture
def run_on(shared_ray, two_workers):
    """Runs jobs on an executor by name, on the workers that tests share if it is said nothing else about them."""

    def run(name, *arguments, **settings):
        chosen = two_workers if name == two_workers.name and not settings else executor(name, **settings)
        return chosen.run(*arguments)

    return run


class TestEverywhere:
    @pytest.mark.parametrize("name", EVERYWHERE)
    def test_every_job_once_in_any_order(self, run_on, name):
        found = list(run_on(name, shifted, torch.ones(2), [0, 1, 2, 3, 4]))
        assert sorted(index for index, _ in found) == [0, 1, 2, 3, 4]
        assert all(torch.equal(value, torch.full((2,), 1.0 + index)) for index, value in found)

    @pytest.mark.parametrize("name", EVERYWHERE)
    def test_no_jobs(self, run_on, name):
        assert list(run_on(name, shifted, None, [])) == []

    @pytest.mark.parametrize("name", EVERYWHERE)
    @pytest.mark.parametrize(
        ("job", "error", "message"),
        [
            ("holdfast", HoldfastError, "learning_rate is -1; expected a number above 0."),
            ("lookup", KeyError, "'lookup'"),
            ("two parts", Exception, "1 and 2"),  # of its own class only where it need not be sent
        ],
    )
    def test_what_work_raises_is_raised_and_not_tried_again(self, run_on, tmp_path, name, job, error, message):
        with pytest.raises(error) as raised:
            list(run_on(name, fails, tmp_path, [job]))
        assert str(raised.value).removeprefix("TwoPartsError: ") == message
        assert len(list(tmp_path.iterdir())) == 1
        assert name == "serial" or any("in fails" in note for note in raised.value.__notes__)

    @pytest.mark.parametrize("name", EVERYWHERE)
    def test_torch_is_set_as_it_is_here(self, run_on, name):
        before, attention = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
        torch.set_float32_matmul_precision("high")
        torch.set_default_dtype(torch.float64)
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            found = dict(run_on(name, surroundings, None, ["a"], threads=3))  # more than there are cores
            own = torch.get_num_threads()
            assert found == {0: (own if name == "serial" else 3, "torch.float64", "high", False)}
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision(before)
            torch.backends.cuda.enable_flash_sdp(attention)

    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_the_audits_curves_are_the_same_to_the_last_bit(
        self, shared_ray, two_workers, name, trained, benign, restricted
    ):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            other = trained.fresh()
        spec = AuditSpec(budgets=(0, 3), seeds=1, shots=4)
        settings = {"benign": benign, "restricted": restricted, "spec": spec, "run": Run(0, torch.device("cpu"))}
        if "expected" not in _AUDITED:
            _AUDITED["expected"] = audit(other, trained, **settings)
        found = audit(other, trained, **settings, executor=two_workers if name == two_workers.name else name)
        assert found == _AUDITED["expected"]
        assert len({tuple(c.scores) for c in found.curves}) > 3


_AUDITED = {}


class TestWorkers:
    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_results_come_as_they_are_ready(self, run_on, tmp_path, name):
        assert [index for index, _ in run_on(name, first_waits_for_second, tmp_path, [0, 1])] == [1, 0]

    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_the_context_is_sent_once_to_each(self, run_on, tmp_path, name):
        pids = {pid for _, pid in run_on(name, whereabouts, Shipped(tmp_path), range(12))}
        assert os.getpid() not in pids
        assert 1 <= len(list(tmp_path.iterdir())) <= 2
        assert len(pids) <= 2

    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_one_that_is_killed_loses_nothing(self, run_on, tmp_path, name):
        found = list(run_on(name, dies_once, tmp_path, [0, 1, 2, 3, 4, 5]))
        assert sorted(found) == [(j, j * j) for j in range(6)]
        begun = sorted(p.name for p in tmp_path.iterdir())
        assert begun == sorted([f"{j}-0" for j in range(6)] + ["2-1"])  # the others were not disturbed

    @pytest.mark.parametrize("name", ["processes:1", RAY])
    def test_a_job_that_kills_every_worker_is_named(self, run_on, tmp_path, name):
        found = []
        with pytest.raises(HoldfastError, match=f"Job '2' was tried {ATTEMPTS} times.*memory"):  # noqa: PT012
            for each in run_on(name, dies_always, tmp_path, [0, 1, 2]):
                found.append(each)
        assert sorted(found) == [(0, 0), (1, 1)]  # what was finished before is not lost
        assert sorted(p.name for p in tmp_path.iterdir()) == ["0-0", "1-0", "2-0", "2-1", "2-2"]

    def test_those_that_are_kept_serve_the_next_run_and_end_afterwards(self):
        one = executor("processes:1")
        with one.kept():
            with one.kept():
                first = dict(one.run(whereabouts, None, [0, 1]))
            assert set(dict(one.run(whereabouts, None, [0])).values()) == set(first.values())
            with pytest.raises(KeyError):
                list(one.run(lookup, {"a": 1}, ["a", "b"]))  # the next context, and an error that costs no worker
            assert dict(one.run(lookup, {"a": 2}, ["a"])) == {0: 2}
            mine = set(first.values())
            assert len(mine) == 1
            assert alive(mine) == mine
        assert not alive(mine)

    def test_one_that_is_killed_while_it_waits_loses_nothing(self, two_workers):
        (pid,) = dict(two_workers.run(whereabouts, None, [0])).values()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive({pid}))
        assert dict(two_workers.run(lookup, {"a": 1, "b": 2}, ["a", "b"])) == {0: 1, 1: 2}

    def test_none_is_left_behind_by_who_loses_interest(self):
        before = children(os.getpid())
        results = executor("processes:2").run(whereabouts, None, range(100))
        next(results)
        deadline = time.monotonic() + 30  # a busy machine may be slow to say what a process is
        mine: set[int] = set()
        while len(mine) < 2 and time.monotonic() < deadline:
            mine = {pid for pid in children(os.getpid()) - before if "spawn_main" in command_of(pid)}
        assert len(mine) == 2
        results.close()
        assert not alive(mine)

    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_what_cannot_be_sent(self, run_on, name):
        model = SplitModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), "0", factory=Unsendable())
        with pytest.raises(HoldfastError, match=r"Cannot send the models and tasks .*: it holds a socket"):
            list(run_on(name, shifted, model, [1]))


class TestNames:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("proceses", "did you mean 'processes'"),
            ("rai:2", "did you mean 'ray:N'"),
            ("processes:0", "processes:N with N from 1 to 1024"),
            ("processes:", "processes:N with N from 1"),
            ("ray:two", "ray:N with N from 1"),
            ("serial:2", "did you mean 'serial'"),
        ],
    )
    def test_bad(self, name, message):
        with pytest.raises(HoldfastError, match=message):
            executor(name)

    @pytest.mark.parametrize("name", ["ray", "ray:2", "ray://10.0.0.1:10001"])
    def test_ray_is_not_installed(self, monkeypatch, name):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(HoldfastError, match=r"pip install holdfast\[cluster\]"):
            executor(name)

    def test_an_executor_is_taken_as_it_is(self):
        made = executor("processes:3", threads=2)
        assert executor(made) is made
        assert (made.name, made.workers, made.threads) == ("processes:3", 3, 2)

    def test_as_many_workers_as_there_are_cores_for(self, monkeypatch):

        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        assert worker_count(None, 1, 100) == 8
        assert worker_count(None, 3, 100) == 2
        assert worker_count(None, 16, 100) == 1
        assert worker_count(None, 1, 5) == 5
        assert worker_count(20, 1, 100) == 20

    def test_a_study_gives_the_same_numbers(self, two_workers, tmp_path):
        benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
        spec = {"pair": {"benign": {"data": "digits[0-4]"}, "restricted": {"data": "digits[5-9]"}}, "title": "A pair"}
        methods = {"condition": {"name": "condition", "iterations": 2}, "frontier": {"name": "frontier"}}
        recipe = StudyRecipe.model_validate({
            "kind": "study", "title": "A study", "threads": 1, "seeds": 2, "tau_steps": 5, "tables": {"t": spec},
            "methods": methods,
        })  # fmt: skip
        tasks, run = {"t": [benign, restricted]}, Run(0, torch.device("cpu"))
        here, there = (
            study(recipe, recipe.build_methods(), tasks, None, run=run, executor=each)
            for each in (executor("serial"), two_workers)
        )
        assert here.tables["t"] == there.tables["t"]


class TestPickling:
    @pytest.mark.parametrize("spec", ["mlp", "cnn", "cifar_resnet", "timm:resnet10t"])
    def test_models(self, spec):
        task = load_task("digits[0-4]@channels=3,image_size=32")
        model = load_model(ModelSpec(name=spec), task).eval()
        model.insert_extractor(2 * torch.eye(model.head.weight.shape[1], dtype=torch.float64))
        copy = pickle.loads(pickle.dumps(model))
        x = next(task.sweep("test", 8, device=torch.device("cpu"))).x
        assert copy.facts() == model.facts()
        assert torch.equal(copy(x), model(x))
        assert [p.stride() for p in copy.parameters()] == [p.stride() for p in model.parameters()]
        fresh = []
        for each in (model, copy):
            torch.manual_seed(0)
            fresh.append(each.fresh().facts())
        assert fresh[0] == fresh[1]


SCRIPT = """
import os
from holdfast.runtime.executors import executor

def triple(context, job):
    return 3 * job

def go():
    print(list(executor("processes:1").run(triple, None, [1])), flush=True)

if __name__ == "__main__" or "UNGUARDED" in os.environ:
    go()
    os.environ["UNGUARDED"] = "as if the line above were at the margin, for workers that start from now on"
    go()
"""


def test_a_script_needs_a_guard_and_is_told_so(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "[(0, 3)]\n", done.stderr
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert 'belong under `if __name__ == "__main__":`' in last, done.stderr


def children(pid: int) -> set[int]:
    shown = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in shown.splitlines()]
    return {int(own) for own, parent, state in rows if int(parent) == pid and not state.startswith("Z")}


def command_of(pid: int) -> str:
    command = ["ps", "-ww", "-o", "args=", "-p", str(pid)]  # ww: a long path would push what is asked for off the line
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def alive(pids: set[int]) -> set[int]:
    shown = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in shown.splitlines()]
    return {int(pid) for pid, state in rows if int(pid) in pids and not state.startswith("Z")}


HELD = """
import time
from pathlib import Path

from holdfast.models.families.builtin import CNN

HERE = Path(__file__).parents[1]

class Held(CNN):
    def forward(self, x):
        while (HERE / "limit").exists() and self.enough():
            time.sleep(0.01)
        return super().forward(x)

    def enough(self):
        trials = HERE / "killed" / "checkpoints" / "trials.jsonl"
        return trials.exists() and trials.read_text().count("\\n") > int((HERE / "limit").read_text())

def make():
    return Held((1, 8, 8), 5)
"""
"""A model that waits where a file says how many trials should be finished, and more are."""


@pytest.fixture
def command(tmp_path, trained):
    (tmp_path / "held.py").write_text(HELD)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trained.fresh().save(tmp_path / "fresh.safetensors")
    trained.save(tmp_path / "original.safetensors")
    held = f"{tmp_path / 'held.py'}:make"
    return ["audit", held, "--weights", tmp_path / "fresh.safetensors", "--original", held, "--original-weights",
            tmp_path / "original.safetensors", "--head", "head", "--benign", "digits[0-4]", "--restricted",
            "digits[5-9]", "--battery", "quick-v1", "--budgets", "0,2", "--seeds", "1", "--shots", "8",
            "--set", "side_effects=false", "--device", "cpu", "--threads", "1"]  # fmt: skip


def test_interrupted_then_killed_then_continued_to_the_same_numbers(command, tmp_path):
    """Ctrl-C as a terminal sends it, to all processes; then kill -9 of the driver alone; the rest without helpers."""
    trials = tmp_path / "killed" / "checkpoints" / "trials.jsonl"
    arguments = [str(a) for a in [*command, "--out", tmp_path / "killed"]]

    def finished():
        return trials.read_text().count("\n") - 1 if trials.exists() else 0

    def begin_after(more, workers):
        """Starts it, and returns when so many more trials are finished; the next ones never are."""
        enough = finished() + more
        (tmp_path / "limit").write_text(str(enough))
        process = start(*arguments, "--executor", f"processes:{workers}", start_new_session=True)
        wait_for(lambda: finished() >= enough, process)
        helpers = children(process.pid)
        assert len(helpers) >= workers
        return process, helpers

    process, helpers = begin_after(2, workers=2)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert time.monotonic() - begin < 30
    wait_for(lambda: not alive(helpers), seconds=60)

    process, helpers = begin_after(3, workers=1)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(helpers), seconds=60)
    kept = finished()
    assert kept > 4
    assert not (tmp_path / "killed" / "result.json").exists()

    (tmp_path / "limit").unlink()
    for folder in ("killed", "whole"):
        with pytest.raises(SystemExit):
            main([str(a) for a in [*command, "--out", tmp_path / folder]])
    keys = [
        [json.loads(line)["key"] for line in journal.read_text().splitlines()[1:]]
        for journal in (trials, tmp_path / "whole" / "checkpoints" / "trials.jsonl")
    ]
    assert kept < len(keys[0]) == len(set(keys[0]))
    assert sorted(keys[0]) == sorted(keys[1])
    assert read_result(tmp_path / "killed").numbers() == read_result(tmp_path / "whole").numbers()
