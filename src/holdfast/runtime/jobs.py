"""Jobs: independent pieces of a long computation. What a store holds already is not computed again.

Everything that takes long here is a list of jobs: pretraining, immunizations, trials of an audit, attacks and
measurements of a protocol, pieces of a study. A job is the inputs of a function and a key; the function must not depend
on anything else but the context that all jobs share. `run_jobs` computes what the store lacks, wherever the executor
does it, and keeps every result at once, so that a killed run continues where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from holdfast.runtime.executors import Executor
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run

Context = TypeVar("Context")
Inputs = TypeVar("Inputs")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Job(Generic[Inputs]):
    """One piece of work.

    Attributes:
        key: names its result among all results in the store. Together with what the store is for it says everything
            that the result depends on.
        inputs: what the function gets; small and picklable.
        label: names the job for a person, in errors and behind the progress bar.
    """

    key: str
    inputs: Inputs = field(repr=False)
    label: str

    def __str__(self) -> str:
        return self.label


class Store(Protocol[Value]):
    """Where finished results are."""

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Returns the keys without a result, in order.

        Raises:
            HoldfastError: if a result that is there is damaged; no other result is computed first.
        """

    def put(self, key: str, value: Value) -> None:
        """Keeps a result; when this returns, it survives a kill."""

    def get(self, key: str) -> Value:
        """Returns a result that is there."""


class JournalStore(Store[Value]):
    """Results as entries of a journal: pydantic models, or what JSON holds.

    Args:
        journal: a file, or memory.
        readers: by key: makes a result of its entry, and raises a ValueError, TypeError or KeyError if it cannot.
    """

    def __init__(self, journal: Journal, readers: Mapping[str, Callable[[Any], Value]]) -> None:
        self.journal, self.readers = journal, readers

    def missing(self, keys: Sequence[str]) -> list[str]:
        """See `Store.missing`."""
        return self.journal.missing({key: self.readers[key] for key in keys})

    def put(self, key: str, value: Value) -> None:
        """See `Store.put`."""
        self.journal.add(key, value.model_dump(mode="json") if isinstance(value, BaseModel) else value)

    def get(self, key: str) -> Value:
        """See `Store.get`."""
        return self.journal.read(key, self.readers[key])


def run_jobs(
    function: Callable[[Context, Any], Any],
    context: Context,
    jobs: Sequence[Job[Inputs]],
    store: Store[Value],
    *,
    run: Run,
    executor: Executor | None,
    description: str | None = None,
    together: Callable[[Sequence[Inputs]], Sequence[Sequence[int]]] | None = None,
    finished: Callable[[Value], None] | None = None,
) -> list[Value]:
    """Computes what the store lacks, and returns the results of all jobs in order.

    Args:
        function: of a module, so that other processes can import it; gets the context and a job's inputs.
        context: what all jobs need; it travels once to each worker.
        jobs: those of one key are computed once.
        store: has what was finished before, and keeps each result as soon as it is there.
        run: whose progress display is used.
        executor: where jobs run; it does not change results. None: here, by all launched processes together, for a job
            that they share among themselves.
        description: of the progress display; None: no display, since the jobs have their own.
        together: groups the inputs of all jobs, by their indices, into batches that are computed together, whatever of
            them was done before; `function` then gets the inputs of a batch and returns as many results. Of a batch
            that is there in part, only what is missing is kept.
        finished: is given each result that was computed now, after it was kept.

    Returns:
        What the store gives back, whether a result was computed now or before.

    Raises:
        HoldfastError: if a kept result is damaged, or workers die of the same job several times.

    Example:
        >>> kept = JournalStore(Journal(None, {}), {"3": int, "4": int})
        >>> squares = [Job("3", 3, "three"), Job("4", 4, "four")]
        >>> run_jobs(lambda exponent, base: base**exponent, 2, squares, kept, run=Run(), executor=None)
        [9, 16]
    """
    every = list({job.key: job for job in jobs}.values())
    missing = set(store.missing([job.key for job in every]))
    batches: list[tuple[Job[Inputs], ...]] = []
    if missing:
        groups = [[i] for i in range(len(every))] if together is None else together([job.inputs for job in every])
        batches = [tuple(every[i] for i in group) for group in groups]
    batches = [batch for batch in batches if any(job.key in missing for job in batch)]
    shown = replace(run, quiet=True) if description is None or not every else run
    with shown.progress(description or "", len(every), len(every) - len(missing)) as bar:
        for index, values in _computed(partial(_batch, function, together is None), context, batches, executor):
            for job, value in zip(batches[index], values, strict=True):
                if job.key in missing:
                    store.put(job.key, value)
                    bar.tick(job.label)
                    if finished is not None:
                        finished(value)
    return [store.get(job.key) for job in jobs]


def _computed(
    work: Callable[[Any, _Inputs], list[Any]],
    context: Any,
    batches: Sequence[Sequence[Job[Any]]],
    executor: Executor | None,
) -> Iterator[tuple[int, list[Any]]]:
    inputs = [_Inputs(tuple(job.inputs for job in batch), batch[0].label) for batch in batches]
    if executor is None:
        return ((index, work(context, each)) for index, each in enumerate(inputs))
    return executor.run(work, context, inputs)


@dataclass(frozen=True)
class _Inputs:
    """What travels to a worker of a batch."""

    values: tuple[Any, ...]
    label: str

    def __str__(self) -> str:
        return self.label


def _batch(function: Callable[[Any, Any], Any], singly: bool, context: Any, inputs: _Inputs) -> list[Any]:
    if singly:
        return [function(context, value) for value in inputs.values]
    return list(function(context, inputs.values))
