"""Studies: several linear defenses on one or many pairs of tasks, in the tables of the ICML 2025 paper."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adversaries import Adversary, listed
from holdfast.defenses import LinearDefense, LinearProblem
from holdfast.errors import HoldfastError
from holdfast.experiments.linear.measures import (
    ROLES,
    Domain,
    Pairs,
    Role,
    check_numbers,
    measure,
    measured_entry,
    pairs_of,
)
from holdfast.experiments.linear.specs import IDENTITY, ProbesSpec, StudySpec, StudyTable
from holdfast.experiments.linear.tables import study_figures, study_findings, study_tables
from holdfast.models import SplitModel
from holdfast.results.tables import Cell, Outcome, Table
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, JournalStore, run_jobs
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run
from holdfast.spectral.frontier import Frontier
from holdfast.tasks import Task, TaskSpec


def study(
    spec: StudySpec,
    methods: Mapping[str, LinearDefense],
    tasks: Mapping[str, Sequence[Task]],
    model: SplitModel | None,
    *,
    run: Run,
    executor: Executor | None = None,
) -> Outcome:
    """Runs every method on every pair with every seed and measures its extractor.

    With a folder in `run`, every result is stored at once, and a second call runs only the missing jobs.

    Args:
        spec: tables and measurements.
        methods: the defenses by row.
        tasks: by table: benign and restricted task of a pair, or the one task whose classes are paired.
        model: see `StudySpec.model`.
        run: seed, folder, progress.
        executor: where methods run and are measured; it does not change the result. None: in this process.

    Raises:
        HoldfastError: if a task cannot be used, before any method has run.
    """
    pairs = {name: pairs_of(table, tasks[name], model) for name, table in spec.tables.items()}
    context = _Context(spec, methods, pairs, run)
    belongs_to = {
        "seed": run.seed,
        "study": spec.model_dump(mode="json", exclude={"methods"}),
        "methods": {row: {"name": d.name, **d.config()} for row, d in methods.items()},
        "data": {name: [t.facts().sha256 for t in each] for name, each in tasks.items()},
        "model": None if model is None else model.facts().sha256,
    }
    journal = Journal(run.path("study.jsonl"), belongs_to, "study")
    pieces = {name: _pieces(name, pairs[name], methods, spec) for name in spec.tables}
    probes = {} if spec.probes is None else {name: _probe_jobs(name, methods, spec.probes) for name in spec.tables}
    readers: dict[str, Callable[[Any], Any]] = {
        job.key: partial(measured_entry, spec, spec.tables[name].held_out, context.curve_steps(job.inputs))
        for name, jobs in pieces.items()
        for job in jobs
    }
    probe_jobs = itertools.chain.from_iterable(probes.values())
    scores = JournalStore(journal, {job.key: partial(_probe_scores, len(job.inputs.budgets)) for job in probe_jobs})
    scores.missing(list(scores.readers))  # finds damaged entries before anything is measured
    every = list(itertools.chain.from_iterable(pieces.values()))
    store = JournalStore(journal, readers)
    values = run_jobs(_measure, context, every, store, run=run, executor=executor, description="Measuring")
    by_key = {job.key: value for job, value in zip(every, values, strict=True)}
    outcome = Outcome({}, {}, [])
    for name, settings in spec.tables.items():
        measured = {
            row: [[by_key[_key(name, pair, row, seed)] for pair, _, _ in pairs[name]] for seed in seeds]
            for row, seeds in _rows(methods, spec).items()
        }
        rows = list(measured)
        outcome += Outcome(
            study_tables(name, settings, rows, measured, spec),
            study_figures(name, settings, rows, measured, pairs[name]),
            study_findings(settings, rows, measured, pairs[name]),
        )
    for name, jobs in probes.items():
        curves = run_jobs(_probe, context, jobs, scores, run=run, executor=executor, description="Probing")
        table = _probe_table(spec.tables[name], pairs[name], [job.inputs for job in jobs], curves)
        outcome += Outcome({f"{name}_probes": table}, {}, [])
    return outcome


@dataclass(frozen=True)
class _Piece:
    """An extractor to measure: of a method with a seed, on a pair of a table."""

    table: str
    pair: str
    row: str
    seed: int


@dataclass(frozen=True)
class _ProbePiece:
    """A probe to run on the features of a method's extractor."""

    table: str
    row: str
    role: Role
    adversary: Adversary
    budgets: tuple[int, ...]


@dataclass(frozen=True)
class _Context:
    """Input of all jobs of a study; sent once to each worker."""

    spec: StudySpec
    methods: Mapping[str, LinearDefense]
    pairs: Mapping[str, Pairs]
    run: Run
    _problems: dict[tuple[str, str], LinearProblem] = field(default_factory=dict, repr=False)
    _extractors: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def pair(self, table: str, pair: str | None = None) -> tuple[str, Domain, Domain]:
        """Returns a pair of a table; without a name, its only one."""
        return next(each for each in self.pairs[table] if pair in (None, each[0]))

    def problem(self, table: str, pair: str) -> LinearProblem:
        """Returns the problem of a pair; the last one is cached, since jobs come pair by pair."""
        if (table, pair) not in self._problems:
            self._problems.clear()
            _, benign, restricted = self.pair(table, pair)
            settings = self.spec.tables[table]
            frontier = Frontier.of(benign.problem, restricted.problem, space=settings.space, ridge=settings.ridge)
            self._problems[table, pair] = LinearProblem(frontier, benign.train, restricted.train)
        return self._problems[table, pair]

    def curve_steps(self, piece: _Piece) -> int:
        """Returns the steps of the norm-ratio curves; only the first seed of a single pair has curves."""
        return self.spec.norm_ratio_steps if len(self.pairs[piece.table]) == 1 and piece.seed == 0 else 0

    def extractor(self, table: str, pair: str, row: str, seed: int) -> Tensor:
        """Returns a method's extractor, in the problem's coordinates."""
        problem, method = self.problem(table, pair), self.methods.get(row)
        if method is None:
            return torch.eye(problem.width, dtype=torch.float64, device=problem.frontier.basis.device)
        own = Run(self.run.generator("study", table, pair, seed).initial_seed(), self.run.device)
        return method.extractor(problem, run=own)[0]

    def scaled_extractor(self, table: str, row: str) -> Tensor:
        """Returns an extractor on all features, at the scale of a released model, which matters for Adam and L-BFGS."""
        if (table, row) not in self._extractors:
            pair, benign, _ = self.pair(table)
            theta = self.problem(table, pair).frontier.full(self.extractor(table, pair, row, 0))
            root = benign.problem.root
            self._extractors[table, row] = theta * (root.norm() / (root @ theta).norm())
        return self._extractors[table, row]


def _measure(context: _Context, piece: _Piece) -> dict[str, Any]:
    spec, table = context.spec, context.spec.tables[piece.table]
    _, benign, restricted = context.pair(piece.table, piece.pair)
    return measure(
        context.problem(piece.table, piece.pair).frontier,
        context.extractor(piece.table, piece.pair, piece.row, piece.seed),
        (benign.train[0], restricted.train[0]),
        spec,
        before=(benign.published, restricted.published),
        curves=context.curve_steps(piece),
        held_out=(benign.held_out, restricted.held_out) if table.held_out else None,
    )


def _probe(context: _Context, piece: _ProbePiece) -> list[float | None]:
    """Scores of a probe on a method's features; it gets exactly the features that the method transforms."""
    _, benign, restricted = context.pair(piece.table)
    theta = context.scaled_extractor(piece.table, piece.row)
    model, task = _behind(theta, restricted if piece.role == "restricted" else benign)
    return piece.adversary.attack(model, task, budgets=(0, *piece.budgets), run=context.run).scores[1:]


def _rows(methods: Mapping[str, LinearDefense], spec: StudySpec) -> dict[str, range]:
    """Seeds by row; the identity is not random."""
    return {IDENTITY: range(1), **{row: range(spec.seeds) for row in methods}}


def _pieces(name: str, pairs: Pairs, methods: Mapping[str, LinearDefense], spec: StudySpec) -> list[Job[_Piece]]:
    return [
        Job(_key(name, pair, row, seed), _Piece(name, pair, row, seed), f"{pair}: {row}")
        for pair, _, _ in pairs
        for row, seeds in _rows(methods, spec).items()
        for seed in seeds
    ]


def _probe_jobs(name: str, methods: Mapping[str, LinearDefense], probes: ProbesSpec) -> list[Job[_ProbePiece]]:
    return [
        Job(
            _key(name, "probe", role, adversary.name, row),
            _ProbePiece(name, row, role, adversary, probes.budgets),
            adversary.name,
        )
        for role in ROLES
        for adversary in listed(probes.battery)
        if role == "restricted" or adversary.name in probes.benign
        for row in (IDENTITY, *methods)
    ]


def _probe_table(
    table: StudyTable, pairs: Pairs, pieces: Sequence[_ProbePiece], scores: Sequence[Sequence[float | None]]
) -> Table:
    ((_, _, restricted),) = pairs
    rows: list[dict[str, str | Cell]] = []
    for piece, own in zip(pieces, scores, strict=True):
        cells = {f"step {k}": Cell.of([s]) for k, s in zip(piece.budgets, own, strict=True)}
        rows.append({"model": f"{piece.role}: {piece.adversary.name}", "method": piece.row, **cells})
    unit = "accuracy" if restricted.task is None else restricted.task.audit_unit
    return Table(
        title=f"{table.title}: {unit} of linear probes",
        note="Every probe trains on all training samples of its task; scores are on the test split.",
        rows=rows,
        percent=True,
    )


def _key(*parts: object) -> str:
    """The key of a job; unambiguous for any characters in the parts."""
    return json.dumps(parts, ensure_ascii=False)


def _probe_scores(budgets: int, entry: Any) -> list[float | None]:
    """Reads a probe's scores from their entry in the journal."""
    if not isinstance(entry, list) or len(entry) != budgets:
        raise ValueError(f"it is not a list of {budgets} scores")
    check_numbers("a score", entry)
    return entry


def _behind(theta: Tensor, domain: Domain) -> tuple[SplitModel, Task]:
    """A model with theta as its extractor, and the task whose inputs are the domain's features."""
    if domain.task is None or domain.test is None:
        raise HoldfastError("Probes need tasks with test data: set held_out, and a single pair of tasks.")
    width, classes = len(theta), domain.task.num_outputs
    head = nn.utils.skip_init(nn.Linear, width, classes, dtype=torch.float64)  # type: ignore[no-untyped-call]
    model = SplitModel(nn.Sequential(head), "0")
    model.add_extractor()
    with torch.no_grad():
        model.network.get_submodule("0.0").weight.copy_(theta.T)  # type: ignore[operator]
    return model, domain.task.with_inputs(domain.train[0], domain.test[0])


def sources(spec: StudySpec) -> Iterator[tuple[str, tuple[TaskSpec, ...]]]:
    """Yields the task specifications of every table, in the order that `study` expects."""
    for name, table in spec.tables.items():
        if table.pair is not None:
            yield name, (table.pair.benign, table.pair.restricted)
        elif table.class_pairs is not None:
            yield name, (table.class_pairs.data,)
