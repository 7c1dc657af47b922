"""The engine of jobs: what a store lacks is computed once, kept at once, and never again."""

from __future__ import annotations

import pytest

from holdfast.errors import HoldfastError
from holdfast.runtime.executors import executor
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run


def square(calls, base):
    calls.append(base)
    return base**2


def whole(entry):
    if not isinstance(entry, int):
        raise ValueError("it is no number")
    return entry


def jobs(*bases):
    return [Job(f"square of {base}", base, f"{base} squared") for base in bases]


def store(path, *bases):
    return JournalStore(Journal(path, {}), {job.key: whole for job in jobs(*bases)})


def run(calls, some, kept, **settings):
    return run_jobs(square, calls, some, kept, run=Run(), **{"executor": executor("serial"), **settings})


@pytest.mark.parametrize("chosen", [None, executor("serial")])
def test_results_are_in_the_order_of_the_jobs_and_each_key_is_computed_once(chosen):
    calls = []
    assert run(calls, jobs(3, 2, 3), store(None, 3, 2), executor=chosen) == [9, 4, 9]
    assert calls == [3, 2]


def test_what_was_finished_before_a_failure_is_kept(tmp_path):
    calls, path = [], tmp_path / "jobs.jsonl"
    with pytest.raises(TypeError):
        run(calls, jobs(2, "three", 4), store(path, 2, "three", 4))
    assert calls == [2, "three"]
    calls.clear()
    assert run(calls, jobs(2, 4), store(path, 2, 4)) == [4, 16]
    assert calls == [4]


def test_damage_is_found_before_anything_is_computed(tmp_path):
    calls, path = [], tmp_path / "jobs.jsonl"
    run(calls, jobs(2), store(path, 2))
    path.write_text(path.read_text().replace('"value": 4', '"value": "four"'))
    calls.clear()
    with pytest.raises(HoldfastError, match=r"jobs.jsonl' is damaged .square of 2: it is no number"):
        run(calls, jobs(5, 2), store(path, 5, 2))
    assert calls == []


def test_batches_are_those_of_all_jobs_whatever_was_done_before(tmp_path):
    batches, path = [], tmp_path / "jobs.jsonl"
    run([], jobs(2), store(path, 2))

    def squares(context, bases):
        batches.append(bases)
        return [base**2 for base in bases]

    told = []
    found = run_jobs(
        squares, None, jobs(1, 2, 3, 4), store(path, 1, 2, 3, 4), run=Run(), executor=executor("serial"),
        together=lambda bases: [[0, 1], [2, 3]] if len(bases) == 4 else [], finished=told.append,
    )  # fmt: skip
    assert found == [1, 4, 9, 16]
    assert batches == [(1, 2), (3, 4)]  # 2 is computed again beside 1, and not kept again
    assert told == [1, 9, 16]
    assert len(path.read_text().splitlines()) == 5


def test_a_batch_that_is_there_is_not_computed(tmp_path):
    path = tmp_path / "jobs.jsonl"
    run([], jobs(1, 2), store(path, 1, 2))
    found = run_jobs(
        lambda *_: pytest.fail("was computed before"), None, jobs(1, 2), store(path, 1, 2), run=Run(), executor=None,
        together=lambda _: [[0, 1]],
    )  # fmt: skip
    assert found == [1, 4]
