"""Studies: several linear defenses on one or many pairs of tasks, measured alike and laid out as the paper's tables."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from holdfast.adversaries import Adversary, listed
from holdfast.defenses import LinearDefense, LinearProblem
from holdfast.errors import HoldfastError, unknown
from holdfast.models import ModelSpec, SplitModel, feature_precision, features
from holdfast.results.tables import Cell, Figure, Lines, Map, Outcome, Table
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run, Ticker
from holdfast.spectral.convergence import measured_tau, norm_ratios, predicted_tau
from holdfast.spectral.frontier import Frontier, SpaceName
from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.rir import published_kappa, published_ratio, ratios_behind, relative_immunization_ratio
from holdfast.spectral.spectrum import EPS, PUBLISHED_FLOOR
from holdfast.tasks import Task, TaskSpec

IDENTITY = "identity"
Role = Literal["restricted", "benign"]
ROLES: Final[tuple[Role, ...]] = ("restricted", "benign")
Values = dict[str, float | None]
XY = tuple[Tensor, Tensor]


class PairSpec(BaseModel):
    """A benign and a restricted task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: TaskSpec
    restricted: TaskSpec


class ClassPairsSpec(BaseModel):
    """All ordered pairs of classes of one data set, as in the paper's MNIST task: a class's inputs alone are a domain.

    With one class in a domain its labels are constant; the target of every sample is 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: TaskSpec
    mean: float = Field(0.0, description="Subtracted from inputs (images are in [0, 1]).")
    std: float = Field(1.0, gt=0, description="Divides them afterwards.")


class StudyTable(BaseModel):
    """One table of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    pair: PairSpec | None = None
    class_pairs: ClassPairsSpec | None = None
    space: SpaceName = Field(
        "common", description="See `Frontier.of`; the same for all methods and for what is measured."
    )
    ridge: float = Field(0.01, gt=0)
    held_out: bool = Field(False, description="Measure (i) and (ii) on the tasks' test splits as well.")
    paper: dict[str, dict[str, float]] = Field({}, description="The paper's numbers: method, cell, value.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.pair is None) == (self.class_pairs is None):
            raise ValueError("give either `pair` or `class_pairs`")
        if self.class_pairs is not None and self.held_out:
            raise ValueError("held_out needs a `pair`: of `class_pairs` nothing is held out")
        return self


class ProbesSpec(BaseModel):
    """Linear probes to run behind every method, on single pairs of classification tasks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    battery: str = "probes-v1"
    budgets: tuple[int, ...] = (1, 10, 100)
    benign: tuple[str, ...] = Field((), description="Adversaries of the battery to run on the benign task, too.")

    @model_validator(mode="after")
    def _known(self) -> Self:
        names = [a.name for a in listed(self.battery)]
        for name in self.benign:
            if name not in names:
                raise unknown(f"adversary of {self.battery}:", name, names)
        if not self.budgets or self.budgets[0] < 1 or any(a >= b for a, b in itertools.pairwise(self.budgets)):
            raise ValueError(f"budgets are {list(self.budgets)}; expected at least one, ascending, from 1 on")
        return self


class StudySpec(BaseModel):
    """What a study does, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: int = Field(1, ge=1, description="Repetitions of every method.")
    model: ModelSpec | None = Field(None, description="Whose features the probes see; null: the inputs themselves.")
    tables: dict[str, StudyTable]
    methods: dict[str, dict[str, Any]] = Field(
        description="Linear defenses by the name of their row: `name`, settings."
    )
    tau_q: float = Field(0.9, gt=0, lt=1, description="Share of the removable loss in tau_q.")
    tau_steps: int = Field(1000, ge=0, description="Steps to run for the measured tau_q; 0: only predict it.")
    norm_ratio_steps: int = Field(0, ge=0, description="Steps of the norm-ratio curves of single pairs; 0: no curves.")
    probes: ProbesSpec | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.methods or IDENTITY in self.methods:
            raise ValueError(f"methods has {list(self.methods)}; give at least one, and none called {IDENTITY!r}")
        if self.probes is not None and not all(t.pair and t.held_out for t in self.tables.values()):
            raise ValueError("probes need every table to be a `pair` with `held_out: true`")
        return self


@dataclass(frozen=True)
class _Domain:
    """The samples of one task, and their least squares, computed once."""

    name: str
    train: XY
    test: XY | None
    task: Task | None = None
    precision: float = EPS

    @cached_property
    def problem(self) -> LeastSquares:
        return LeastSquares.of(*self.train, precision=self.precision)

    @cached_property
    def held_out(self) -> LeastSquares:
        assert self.test is not None
        return LeastSquares.of(*self.test)

    @cached_property
    def published(self) -> float:
        """The published condition number, which every extractor behind these features is compared with."""
        return published_kappa(self.train[0])


_Pairs = list[tuple[str, _Domain, _Domain]]

MAIN: Final = ("ratio_restricted", "ratio_benign", "rir", "rir_bound", "immunized")
HELD_OUT: Final = ("held_out_ratio_restricted", "held_out_ratio_benign")
CONVERGENCE: Final = (
    "tau_restricted",
    "tau_restricted_measured",
    "tau_restricted_ratio",
    "tau_benign",
    "tau_benign_measured",
    "tau_benign_ratio",
)
PUBLISHED: Final = ("published_ratio_restricted", "published_ratio_benign", "published_rir")


def study(
    spec: StudySpec,
    methods: Mapping[str, LinearDefense],
    tasks: Mapping[str, Sequence[Task]],
    model: SplitModel | None,
    *,
    run: Run,
) -> Outcome:
    """Runs every method on every pair with every seed and measures all of them alike.

    With a folder in `run`, every finished piece is kept at once, and a second call does only what is missing.

    Args:
        spec: tables and what to measure.
        methods: the defenses by row.
        tasks: by table: benign and restricted task of a pair, or the one task whose classes are paired.
        model: see `StudySpec.model`.
        run: seed, folder, progress.

    Raises:
        HoldfastError: if a task cannot serve, before any method has run.
    """
    pairs = {name: _pairs(table, tasks[name], model) for name, table in spec.tables.items()}
    rows = [IDENTITY, *methods]
    journal = Journal(run.path("study.jsonl"), _belongs(spec, methods, tasks, model, run), "study")
    readers = {
        _key(name, pair, row, seed): partial(_measured, spec, table.held_out, _curve_steps(spec, pairs[name], seed))
        for name, table in spec.tables.items()
        for pair, _, _ in pairs[name]
        for row, seed in _trials(methods, spec)
    }
    if spec.probes is not None:
        for job in itertools.chain.from_iterable(_probe_jobs(name, methods, spec.probes) for name in spec.tables):
            journal.missing({_probe_key(*job): partial(_probe_scores, len(spec.probes.budgets))})
    total, missing = len(readers), len(journal.missing(readers))
    figures: dict[str, Figure] = {}
    tables: dict[str, Table] = {}
    findings: list[str] = []
    with run.progress("Measuring", total, total - missing) as bar:
        for name, table in spec.tables.items():
            measured = _measure_table(name, table, pairs[name], spec, methods, run, journal, bar)
            tables |= _tables(name, table, rows, measured, spec)
            figures |= _figures(name, table, rows, measured, pairs[name])
            findings += _findings(table, rows, measured, pairs[name])
        if spec.probes is not None:
            for name, table in spec.tables.items():
                tables[f"{name}_probes"] = _probes(name, table, pairs[name], spec, methods, run, journal)
    return Outcome(tables, figures, findings)


def _belongs(
    spec: StudySpec,
    methods: Mapping[str, LinearDefense],
    tasks: Mapping[str, Sequence[Task]],
    model: SplitModel | None,
    run: Run,
) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "study": spec.model_dump(mode="json", exclude={"methods"}),
        "methods": {row: {"name": d.name, **d.config()} for row, d in methods.items()},
        "data": {name: [t.facts().sha256 for t in each] for name, each in tasks.items()},
        "model": None if model is None else model.facts().sha256,
    }


def _pairs(table: StudyTable, tasks: Sequence[Task], model: SplitModel | None) -> _Pairs:
    if table.class_pairs is None:
        benign, restricted = (_domain(task, model, table.held_out) for task in tasks)
        return [(f"{benign.name} -> {restricted.name}", benign, restricted)]
    spec, (task,) = table.class_pairs, tasks
    x, y = features(model, task, "train")
    x, precision = (x - spec.mean) / spec.std, feature_precision(model, task)
    domains = [
        _Domain(str(c), (x[own], y[own, c : c + 1]), None, None, precision)
        for c in range(y.shape[1])
        if (own := y[:, c] > 0).any()
    ]
    return [(f"{a.name} -> {b.name}", a, b) for a, b in itertools.permutations(domains, 2)]


def _domain(task: Task, model: SplitModel | None, held_out: bool) -> _Domain:
    test = features(model, task, "test") if held_out else None
    return _Domain(task.name, features(model, task, "train"), test, task, feature_precision(model, task))


def _measure_table(
    name: str,
    table: StudyTable,
    pairs: _Pairs,
    spec: StudySpec,
    methods: Mapping[str, LinearDefense],
    run: Run,
    journal: Journal,
    bar: Ticker,
) -> dict[str, list[list[dict[str, Any]]]]:
    """Measurements by row, seed and pair."""
    found: dict[str, list[list[dict[str, Any]]]] = {row: [] for row in (IDENTITY, *methods)}
    for pair, benign, restricted in pairs:
        trials = _trials(methods, spec)
        keys = {(row, seed): _key(name, pair, row, seed) for row, seed in trials}
        problem: LinearProblem | None = None
        for trial in trials:
            row, seed = trial
            if keys[trial] not in journal.entries:
                if problem is None:
                    frontier = Frontier.of(benign.problem, restricted.problem, space=table.space, ridge=table.ridge)
                    problem = LinearProblem(frontier, benign.train, restricted.train)
                theta = _theta(methods.get(row), problem, run, name, pair, seed)
                curves = _curve_steps(spec, pairs, seed)
                held_out = (benign.held_out, restricted.held_out) if table.held_out else None
                raw, before = (benign.train[0], restricted.train[0]), (benign.published, restricted.published)
                values = measure(problem.frontier, theta, raw, spec, before=before, curves=curves, held_out=held_out)
                journal.add(keys[trial], values)
                bar.tick(f"{pair}: {row}")
            while len(found[row]) <= seed:
                found[row].append([])
            found[row][seed].append(journal.entries[keys[trial]])
    return found


def _trials(methods: Mapping[str, LinearDefense], spec: StudySpec) -> list[tuple[str, int]]:
    """Rows and seeds; the identity has nothing random."""
    return [(IDENTITY, 0), *itertools.product(methods, range(spec.seeds))]


def _key(*parts: object) -> str:
    """Names a piece of work, whatever characters the names in it have."""
    return json.dumps(parts, ensure_ascii=False)


def _curve_steps(spec: StudySpec, pairs: _Pairs, seed: int) -> int:
    return spec.norm_ratio_steps if len(pairs) == 1 and seed == 0 else 0


def _measured(spec: StudySpec, held_out: bool, curves: int, entry: Any) -> dict[str, Any]:
    """Makes the measurements of an extractor of their entry in the journal; refuses any that are not as `measure`'s."""
    names = {*MAIN, *PUBLISHED, *CONVERGENCE, *(HELD_OUT if held_out else ())}
    series = {f"{kind}norm_ratios_{role}" for kind in ("", "published_") for role in ROLES} if curves else set()
    found = dict(entry)
    if found.keys() != names | series:
        raise ValueError(f"it lacks or adds {sorted(found.keys() ^ (names | series))}")
    for name in names:
        if found[name] is not None:
            _refuse_no_number(name, found[name])
    for name in series:
        if not isinstance(found[name], list) or len(found[name]) != curves + 1:
            raise ValueError(f"{name} is not a list of {curves + 1} numbers")
        for value in found[name]:
            if value is not None:
                _refuse_no_number(name, value)
    return found


def _probe_scores(budgets: int, entry: Any) -> list[float | None]:
    """Makes a probe's scores of their entry in the journal."""
    if not isinstance(entry, list) or len(entry) != budgets:
        raise ValueError(f"it is not a list of {budgets} scores")
    for value in entry:
        if value is not None:
            _refuse_no_number("a score", value)
    return entry


def _refuse_no_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, and not a number")


def _theta(method: LinearDefense | None, problem: LinearProblem, run: Run, table: str, pair: str, seed: int) -> Tensor:
    if method is None:
        return torch.eye(problem.width, dtype=torch.float64, device=problem.frontier.basis.device)
    own = Run(run.generator("study", table, pair, seed).initial_seed(), run.device)
    return method.extractor(problem, run=own)[0]


def measure(
    frontier: Frontier,
    theta: Tensor,
    raw: tuple[Tensor, Tensor],
    spec: StudySpec,
    *,
    before: tuple[float, float] | None = None,
    curves: int = 0,
    held_out: tuple[LeastSquares, LeastSquares] | None = None,
) -> dict[str, Any]:
    """Measures one extractor on one pair of tasks.

    Args:
        frontier: the tasks, in coordinates.
        theta: the extractor, in coordinates.
        raw: benign and restricted features before the change of coordinates, as the released code takes them.
        spec: q and step limits.
        before: published condition numbers of `raw`, where they are at hand; None: they are taken here.
        curves: steps of the norm-ratio curves; 0: none.
        held_out: benign and restricted task on other samples, before the change of coordinates.

    Returns:
        Numbers by the name of their cell, None where infinite or undefined, and curves by task.
    """
    original = {"benign": frontier.benign, "restricted": frontier.restricted}
    behind = {role: task.through(theta) for role, task in original.items()}
    for task in behind.values():
        _ = task.svd  # decomposed once, for the ratios and for the steps
    ratios = ratios_behind(**behind, benign_before=frontier.benign, restricted_before=frontier.restricted)
    published = published_ratio(frontier.full(theta), *raw, before)
    values: dict[str, Any] = {
        "ratio_restricted": ratios.restricted,
        "ratio_benign": ratios.benign,
        "rir": ratios.rir,
        "rir_bound": frontier.bound,
        "immunized": float(ratios.immunized),
        "published_ratio_restricted": published.restricted,
        "published_ratio_benign": published.benign,
        "published_rir": published.rir,
    }
    for role, task in behind.items():
        tau = predicted_tau(task, spec.tau_q)
        values[f"tau_{role}"] = tau
        values[f"tau_{role}_ratio"] = tau / predicted_tau(original[role], spec.tau_q)
        measured = measured_tau(task, spec.tau_q, max_steps=spec.tau_steps) if tau <= spec.tau_steps else None
        values[f"tau_{role}_measured"] = measured
        if curves:
            values[f"norm_ratios_{role}"] = norm_ratios(task, curves)
            values[f"published_norm_ratios_{role}"] = norm_ratios(task, curves, floor=PUBLISHED_FLOOR)
    if held_out is not None:
        there = relative_immunization_ratio(theta, *(task.through(frontier.basis) for task in held_out))
        values |= {"held_out_ratio_restricted": there.restricted, "held_out_ratio_benign": there.benign}
    return {
        key: [_finite(v) for v in value] if isinstance(value, list) else _finite(value) for key, value in values.items()
    }


def _tables(
    name: str, table: StudyTable, rows: Sequence[str], measured: dict[str, list[list[dict[str, Any]]]], spec: StudySpec
) -> dict[str, Table]:
    main = (*MAIN, *(HELD_OUT if table.held_out else ()))
    where = "on the subspace common to both tasks" if table.space == "common" else f"with a ridge of {table.ridge:g}"
    notes = {
        name: f"Condition numbers over the non-zero spectrum, {where}. (i) should be large, (ii) at most 1; RIR is "
        "(i) / (ii), and RIR* the bound that no linear extractor exceeds; immunized: share of pairs with (i) above 1 "
        "and (ii) at most 1.",
        f"{name}_convergence": f"tau: steps of constant-step gradient descent until {spec.tau_q:.0%} of the removable "
        "loss is gone, predicted from the spectrum"
        + (f", and measured by running it (at most {spec.tau_steps} steps; a dash: more)" if spec.tau_steps else "")
        + "; ratio: over the identity's.",
        f"{name}_published": "The same ratios as the paper's released code takes them, on the features as they are, "
        f"null directions included, with {PUBLISHED_FLOOR:g} added to every eigenvalue: only to compare with its "
        "printed numbers.",
    }
    titles = {
        name: table.title,
        f"{name}_convergence": f"{table.title}: how fast a probe learns",
        f"{name}_published": f"{table.title}: published-code variant",
    }
    convergence = [c for c in CONVERGENCE if spec.tau_steps or not c.endswith("_measured")]
    columns = {name: main, f"{name}_convergence": convergence, f"{name}_published": PUBLISHED}
    return {
        key: Table(
            title=titles[key],
            note=notes[key],
            rows=[
                {
                    "method": row,
                    **{
                        c: _cell(measured[row], c, table.paper.get(row, {}).get(c.removeprefix("published_")))
                        for c in cells
                    },
                }
                for row in rows
            ],
        )
        for key, cells in columns.items()
    }


def _cell(seeds: Sequence[Sequence[dict[str, Any]]], column: str, paper: float | None) -> Cell:
    """Mean over pairs, then mean and deviation over seeds."""
    return Cell.of((_mean([pair.get(column) for pair in pairs]) for pairs in seeds), paper)


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [v for v in values if v is not None]
    return statistics.fmean(finite) if values and len(finite) == len(values) else None


def _figures(
    name: str,
    table: StudyTable,
    rows: Sequence[str],
    measured: dict[str, list[list[dict[str, Any]]]],
    pairs: _Pairs,
) -> dict[str, Figure]:
    if len(pairs) > 1:
        return {f"{name}_map": _map(table, [r for r in rows if r != IDENTITY], measured, pairs)}
    found: dict[str, Figure] = {}
    for variant, floor in (("", ""), ("published_", ", published-code variant")):
        for role in ("restricted", "benign"):
            key = f"{variant}norm_ratios_{role}"
            curves = {row: measured[row][0][0].get(key) for row in rows}
            if all(curves.values()):
                found[f"{name}_{key}"] = Lines(
                    title=f"{table.title}: norm ratio on the {role} task{floor}",
                    x_title="step of gradient descent with exact line search",
                    y_title="norm ratio (Eq. 16)",
                    x=[float(t) for t in range(len(next(iter(curves.values()))))],  # type: ignore[arg-type]
                    series={row: [_finite(v) for v in curve or []] for row, curve in curves.items()},
                )
    return found


def _map(table: StudyTable, rows: Sequence[str], measured: dict[str, list[list[dict[str, Any]]]], pairs: _Pairs) -> Map:
    names = list(dict.fromkeys(benign.name for _, benign, _ in pairs))

    def panel(row: str) -> list[list[float | None]]:
        grid: list[list[float | None]] = [[None] * len(names) for _ in names]
        for i, (_, benign, restricted) in enumerate(pairs):
            rir = _mean([seed[i]["rir"] for seed in measured[row]])
            grid[names.index(restricted.name)][names.index(benign.name)] = math.log10(rir) if rir else None
        return grid

    return Map(
        title=f"{table.title}: log10 RIR of every pair",
        row_title="restricted class",
        column_title="benign class",
        value_title="log10 RIR",
        rows=names,
        columns=names,
        panels={row: panel(row) for row in rows},
    )


def _findings(
    table: StudyTable, rows: Sequence[str], measured: dict[str, list[list[dict[str, Any]]]], pairs: _Pairs
) -> list[str]:
    """One sentence for a single pair, one a method for many: which are immunized by Definition 3.1 (a) and (b)."""
    methods = [row for row in rows if row != IDENTITY]
    failed = {
        row: [i for i in range(len(pairs)) if not all(seed[i]["immunized"] for seed in measured[row])]
        for row in methods
    }
    if len(pairs) == 1:
        good = [
            f"{row} ({_mean([s[0]['rir'] / s[0]['rir_bound'] for s in measured[row]]):.1%} of RIR*)"
            for row in methods
            if not failed[row]
        ]
        bad = [row for row in methods if failed[row]]
        text = f"{table.title}: (i) above 1 and (ii) at most 1 in every seed: {', '.join(good) or 'no method'}."
        return [text + (f" Not: {', '.join(bad)}." if bad else "")]
    found = []
    for row in methods:
        above = sum((_mean([s[i]["rir"] for s in measured[row]]) or 0) > 1 for i in range(len(pairs)))
        text = f"{row}: {len(pairs) - len(failed[row])} of {len(pairs)} pairs have (i) above 1 and (ii) at most 1 in "
        text += f"every seed; {above} have RIR above 1."
        if failed[row]:
            named = [f"{pairs[i][0]} {_pair_ratios(measured[row], i)}" for i in failed[row]]
            more = f" and {len(named) - 4} more" if len(named) > 4 else ""
            text += f" Not: {', '.join(named[:4])}{more}."
        found.append(text)
    return found


def _pair_ratios(seeds: Sequence[Sequence[dict[str, Any]]], pair: int) -> str:
    return "((i) {:.3g}, (ii) {:.3g})".format(*(_mean([seed[pair][k] for seed in seeds]) or 0.0 for k in MAIN[:2]))


def _probes(
    name: str,
    table: StudyTable,
    pairs: _Pairs,
    spec: StudySpec,
    methods: Mapping[str, LinearDefense],
    run: Run,
    journal: Journal,
) -> Table:
    """Scores of every probe behind every method; a probe gets exactly the features that the method transforms."""
    assert spec.probes is not None
    ((_, benign, restricted),) = pairs
    frontier = Frontier.of(benign.problem, restricted.problem, space=table.space, ridge=table.ridge)
    problem = LinearProblem(frontier, benign.train, restricted.train)
    jobs = _probe_jobs(name, methods, spec.probes)
    thetas: dict[str, Tensor] = {}
    rows: list[dict[str, str | Cell]] = []
    with run.progress("Probing", len(jobs), sum(_probe_key(*job) in journal.entries for job in jobs)) as bar:
        for job in jobs:
            _, row, role, adversary = job
            key = _probe_key(*job)
            if key not in journal.entries:
                if row not in thetas:
                    theta = frontier.full(_theta(methods.get(row), problem, run, name, pairs[0][0], 0))
                    # As in a released model: Adam and L-BFGS feel the scale of the features.
                    root = benign.problem.root
                    thetas[row] = theta * (root.norm() / (root @ theta).norm())
                model, task = _behind(thetas[row], restricted if role == "restricted" else benign)
                curve = adversary.attack(model, task, budgets=(0, *spec.probes.budgets), run=run)
                journal.add(key, curve.scores[1:])
                bar.tick(adversary.name)
            scores = journal.entries[key]
            cells = {f"step {k}": Cell.of([s]) for k, s in zip(spec.probes.budgets, scores, strict=True)}
            rows.append({"model": f"{role}: {adversary.name}", "method": row, **cells})
    unit = "accuracy" if restricted.task is None else restricted.task.audit_unit
    return Table(
        title=f"{table.title}: {unit} of linear probes",
        note="Every probe sees all training samples of its task; scores are on the test split.",
        rows=rows,
        percent=True,
    )


def _probe_jobs(
    name: str, methods: Mapping[str, LinearDefense], probes: ProbesSpec
) -> list[tuple[str, str, Role, Adversary]]:
    """Table, row, task and probe of each score of a table."""
    return [
        (name, row, role, adversary)
        for role in ROLES
        for adversary in listed(probes.battery)
        if role == "restricted" or adversary.name in probes.benign
        for row in (IDENTITY, *methods)
    ]


def _probe_key(name: str, row: str, role: str, adversary: Adversary) -> str:
    return _key(name, "probe", role, adversary.name, row)


def _behind(theta: Tensor, domain: _Domain) -> tuple[SplitModel, Task]:
    """A model whose features are the domain's behind theta, and the task on the features before it."""
    if domain.task is None or domain.test is None:
        raise HoldfastError("Probes need tasks with test data: set held_out, and a single pair of tasks.")
    width, classes = len(theta), domain.task.num_outputs
    head = nn.utils.skip_init(nn.Linear, width, classes, dtype=torch.float64)  # type: ignore[no-untyped-call]
    model = SplitModel(nn.Sequential(head), "0")
    model.add_extractor()
    with torch.no_grad():
        model.network.get_submodule("0.0").weight.copy_(theta.T)  # type: ignore[operator]
    return model, domain.task.with_inputs(domain.train[0], domain.test[0])


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def sources(spec: StudySpec) -> Iterator[tuple[str, tuple[TaskSpec, ...]]]:
    """Yields every table's task specifications, as `study` wants the tasks."""
    for name, table in spec.tables.items():
        if table.pair is not None:
            yield name, (table.pair.benign, table.pair.restricted)
        elif table.class_pairs is not None:
            yield name, (table.class_pairs.data,)
