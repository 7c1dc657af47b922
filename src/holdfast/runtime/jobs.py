"""Jobs: independent units of a long computation. A result that the store holds is not computed again.

All long computations are lists of jobs: pretraining, immunizations, trials of an audit, attacks and measurements of a
protocol, measurements of a study. A job has a key and the inputs of a function; the function may depend only on them
and on the context that all jobs share. `run_jobs` computes the missing results on an executor and stores each at once,
so that an interrupted run can continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """One unit of a computation.

    Attributes:
        key: name of its result in the store. Key and store together determine everything that the result depends on.
        inputs: argument of the function; small and picklable.
        label: readable name, for errors and the progress bar.
    """

    key: str
    inputs: Inputs = field(repr=False)
    label: str

    def __str__(self) -> str:
        return self.label


class Store(Protocol[Value]):
    """Keeps finished results."""

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Returns the keys without a result, in order.

        Raises:
            HoldfastError: if a stored result is damaged; this is checked before anything is computed.
        """

    def put(self, key: str, value: Value) -> None:
        """Stores a result durably: it survives a kill once this returns."""

    def get(self, key: str) -> Value:
        """Returns a stored result."""


class JournalStore(Store[Value]):
    """Stores results, pydantic models or JSON values, as entries of a journal.

    Args:
        journal: on disk or in memory.
        readers: by key, a function from the entry to the result; raises a ValueError, TypeError or KeyError on failure.
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
    """Computes the missing results and returns the results of all jobs in order.

    Args:
        function: a module-level function, so that other processes can import it; takes the context and a job's inputs.
        context: input that all jobs share; sent once to each worker.
        jobs: the jobs; those with the same key are computed once.
        store: holds earlier results and receives each new one as soon as it is computed.
        run: provides the progress display.
        executor: where jobs run; it does not change results. None: in this process, where all launched processes
            compute each job together.
        description: text of the progress display; None: no display, for jobs that have their own.
        together: maps the inputs of all jobs to batches of indices that are always computed together, even if some
            results exist; `function` then takes the inputs of a batch and returns as many results. Results that
            already exist are not replaced.
        finished: called with each new result after it is stored.

    Returns:
        The results as read from the store, whether new or old.

    Raises:
        HoldfastError: if a stored result is damaged, or the workers of one job die several times.

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
    work = partial(_batch, function, together is None)
    inputs = [_Inputs(tuple(job.inputs for job in batch), batch[0].label) for batch in batches]
    computed: Iterable[tuple[int, list[Any]]] = (
        ((index, work(context, each)) for index, each in enumerate(inputs))
        if executor is None
        else executor.run(work, context, inputs)
    )
    with shown.progress(description or "", len(every), len(every) - len(missing)) as bar:
        for index, values in computed:
            for job, value in zip(batches[index], values, strict=True):
                if job.key in missing:
                    store.put(job.key, value)
                    bar.tick(job.label)
                    if finished is not None:
                        finished(value)
    return [store.get(job.key) for job in jobs]


@dataclass(frozen=True)
class _Inputs:
    """Inputs of a batch of jobs, as sent to a worker."""

    values: tuple[Any, ...]
    label: str

    def __str__(self) -> str:
        return self.label


def _batch(function: Callable[[Any, Any], Any], singly: bool, context: Any, inputs: _Inputs) -> list[Any]:
    if singly:
        return [function(context, value) for value in inputs.values]
    return list(function(context, inputs.values))
