from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.adversaries import Adversary, batteries
from holdfast.adversaries.causal_search import CAUSAL
from holdfast.adversaries.search_space import ADAPTIVE, DEFAULT, adversary
from holdfast.auditing import audit as auditing
from holdfast.auditing.audit import audit
from holdfast.auditing.red_flags import REMEDIES, raised
from holdfast.auditing.search import _pruning_thresholds, _value, search
from holdfast.auditing.spec import AuditSpec
from holdfast.auditing.trials import SEARCH_SEED, Trial, TrialContext, TrialRunner
from holdfast.models import SplitModel, load_model, load_task_for
from holdfast.results import ROLES, Curve
from holdfast.runtime import executors
from holdfast.runtime.executors import Executor
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run
from holdfast.tasks import ArrayTask
from texts import save_causal, write_text

CPU = torch.device("cpu")
BUDGETS = (0, 1, 2, 4)


@dataclass(frozen=True)
class Pull(Adversary):
    """Plain descent with a rate; `refused` says that it cannot start."""

    rate: float
    refused: bool = False
    batch_size: int = 12

    @property
    def name(self) -> str:
        return f"pull {self.rate:g}"

    def config(self) -> dict[str, Any]:
        return {"rate": self.rate}

    def not_applicable(self, model, task):
        return "it is refused" if self.refused else None

    def run(self, model, task, *, benign, generator, device) -> Iterator[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), self.rate)
        yield torch.zeros(())
        for batch in task.batches("train", self.batch_size, generator=generator, device=device):
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            yield loss.detach()


@dataclass
class Told:
    """A searcher that proposes random rates, then what was best so far; it remembers what it was told."""

    generator: torch.Generator
    always: tuple[Pull, ...] = ()
    asked: list[list[Pull]] = field(default_factory=list)
    told: list[list[float | None]] = field(default_factory=list)

    def ask(self, count: int) -> list[Pull]:
        best = max(
            ((v, a) for b, vs in zip(self.asked, self.told, strict=True) for a, v in zip(b, vs, strict=True) if v),
            key=lambda pair: pair[0],
            default=(0.0, Pull(0.1)),
        )[1]
        factors = (10 ** (2 * torch.rand(count, generator=self.generator) - 1)).tolist()
        drawn = [*self.always, *(Pull(float(f"{best.rate * f:.2e}")) for f in factors)]
        self.asked.append(drawn[:count])
        return self.asked[-1]

    def tell(self, values) -> None:
        self.told.append(list(values))


@dataclass
class Plan:
    """What `holdfast.adversaries.Search` is to `search`, with a space of one rate."""

    always: tuple[Pull, ...] = ()
    batch: int = 3
    repeated: int = 2
    unpruned: int = 0
    floor: float = 0.0
    begun: list[Told] = field(default_factory=list)

    def begin(self, seed: int) -> Told:
        self.begun.append(Told(torch.Generator().manual_seed(seed), self.always))
        return self.begun[-1]

    def reading(self, flags: list[str]) -> Plan:
        return self

    def config(self) -> dict[str, Any]:
        return {"always": [a.rate for a in self.always], "batch": self.batch}


@pytest.fixture(scope="module")
def models(toy):
    """The same small network twice, with other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [SplitModel(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), "2") for _ in range(2)]


def runner(models, task: ArrayTask, *, seed=0, folder=None, executor="serial") -> TrialRunner:
    run = Run(seed, CPU, folder)
    samples = {("restricted", s): task for s in (SEARCH_SEED, 0, 1)}
    context = TrialContext(models[0], models[1], None, samples, task, BUDGETS, run)
    return TrialRunner(context, Journal(run.path("trials.jsonl"), {}), executors.executor(executor))


@dataclass(frozen=True)
class Sent(Executor):
    """Gives jobs what workers get, the last job first; real processes are tested in tests/runtime/test_executors.py."""

    name: str = "sent"

    def run(self, work, context, jobs):
        for index, job in reversed(list(enumerate(jobs))):
            sent = pickle.loads(pickle.dumps((work, context, job)))
            yield index, pickle.loads(pickle.dumps(sent[0](*sent[1:])))


class TestSearch:
    def test_every_model_gets_as_many_trials(self, models, toy):
        trials, _ = search(Plan(), 7, runner(models, toy))
        assert Counter(t.role for t in trials) == dict.fromkeys(ROLES, 7)
        assert [t.number for t in trials if t.role == "scratch"] == list(range(7))
        assert all(t.config == {"rate": float(t.adversary.split()[1])} for t in trials)

    def test_the_best_few_of_each_model_are_returned_and_marked(self, models, toy):
        trials, found = search(Plan(repeated=2), 7, runner(models, toy))
        expected = []
        for role in ROLES:
            own = sorted((t for t in trials if t.role == role), key=lambda t: -t.score)
            names = list(dict.fromkeys(t.adversary for t in own))[:2]
            assert {t.adversary for t in own if t.confirmed} == set(names)
            expected += names
        assert [a.name for a in found] == list(dict.fromkeys(expected))  # once, if two searches found it

    def test_each_search_is_told_its_own_scores(self, models, toy):
        plan = Plan()
        trials, _ = search(plan, 7, runner(models, toy))
        for role, searcher in zip(ROLES, plan.begun, strict=True):
            assert [len(batch) for batch in searcher.asked] == [3, 3, 1]
            assert [v for batch in searcher.told for v in batch] == [t.score for t in trials if t.role == role]

    def test_a_seed_decides_everything(self, models, toy):
        first, second = (search(Plan(), 7, runner(models, toy)) for _ in range(2))
        assert first == second
        assert search(Plan(), 7, runner(models, toy, seed=1)) != first

    def test_workers_change_nothing(self, models, toy):
        apart, here = (search(Plan(batch=2), 3, runner(models, toy, executor=e)) for e in (Sent(), "serial"))
        assert apart == here

    @pytest.mark.parametrize("stop", [1, 5, 10, 17])
    def test_it_goes_on_where_it_was_interrupted(self, models, toy, tmp_path, monkeypatch, stop):
        whole = search(Plan(), 7, runner(models, toy))
        curve, done, alive = TrialContext.curve, [], iter([True] * stop)

        def counted(self, trial):
            if not next(alive, False):
                raise KeyboardInterrupt
            done.append(trial.key)
            return curve(self, trial)

        monkeypatch.setattr(TrialContext, "curve", counted)
        with pytest.raises(KeyboardInterrupt):
            search(Plan(), 7, runner(models, toy, folder=tmp_path))
        alive = iter([True] * 100)
        assert search(Plan(), 7, runner(models, toy, folder=tmp_path)) == whole
        assert len(done) == len(set(done))  # nothing was run twice
        lines = (tmp_path / "checkpoints" / "trials.jsonl").read_text().splitlines()[1:]
        assert [json.loads(line)["key"] for line in lines] == done

    def test_what_comes_again_is_not_run_again(self, models, toy, monkeypatch):
        ran, curve = [], TrialContext.curve
        monkeypatch.setattr(TrialContext, "curve", lambda self, trial: ran.append(trial.key) or curve(self, trial))
        twin = Pull(0.3)
        trials, _ = search(Plan(always=(twin, twin)), 7, runner(models, toy))
        assert Counter(ran)[f"restricted/scratch/pull 0.3/{SEARCH_SEED}"] == 1
        assert len(trials) == 21  # it counts as a trial all the same, with the score that it had
        assert len({t.score for t in trials if t.role == "scratch" and t.adversary == "pull 0.3"}) == 1

    def test_what_cannot_start_is_told_as_such(self, models, toy):
        plan = Plan(always=(Pull(0.7, refused=True),))
        trials, found = search(plan, 4, runner(models, toy))
        assert "pull 0.7" not in {a.name for a in found}
        refused = [t for t in trials if t.adversary == "pull 0.7"]
        assert [(t.score, t.steps, t.confirmed) for t in refused] == [(None, 0, False)] * 6
        assert {t.failure for t in refused} == {"it is refused"}
        assert {t.failure for t in trials if t.adversary != "pull 0.7"} == {None}
        assert all(searcher.told[0][0] is None for searcher in plan.begun)

    def test_what_the_code_raised_is_told(self, models, toy, monkeypatch):
        def broken(self, *_, **__):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(Pull, "attack", broken)
        trials, found = search(Plan(), 3, runner(models, toy))
        assert found == []
        assert {t.failure for t in trials} == {"RuntimeError: no such kernel"}

    def test_nothing_that_can_start(self, models, toy):
        refused = (Pull(0.7, refused=True), Pull(0.8, refused=True), Pull(0.9, refused=True))
        trials, found = search(Plan(always=refused), 3, runner(models, toy))
        assert len(trials) == 9
        assert found == []

    def test_a_rate_that_explodes_is_told_as_none_or_its_last_finite_value(self, models, toy):
        plan = Plan(always=(Pull(1e30),))
        trials, found = search(plan, 4, runner(models, toy))
        wild = [t for t in trials if t.adversary == "pull 1e+30"]
        assert len(wild) == 6
        assert all(t.score is None or t.score <= max(u.score for u in trials if u.score is not None) for t in wild)
        assert found


class TestValue:
    """What a search maximises, and where it gives up."""

    @staticmethod
    def curve(*folds, budgets=BUDGETS):
        return Curve(
            adversary="a", role="scratch", seed=SEARCH_SEED, budgets=list(budgets[: len(folds)]),
            scores=[None if f is None else sum(f) / len(f) for f in folds], losses=[None, *[1.0] * (len(folds) - 1)],
            folds=list(folds), batch_size=12,
        )  # fmt: skip

    def test_only_every_second_fold_is_seen(self):
        one, two = (self.curve(*[[0.5, unseen, 0.3, unseen]] * 4) for unseen in (0.0, 1.0))
        assert _value(one, 4) == _value(two, 4) == pytest.approx(0.4)

    def test_best_so_far_averaged_over_budgets_above_0(self):
        assert _value(self.curve([0.2], [0.1], [0.6], [0.4]), 4) == pytest.approx((0.2 + 0.6 + 0.6) / 3)

    def test_given_up_keeps_its_last_value(self):
        assert _value(self.curve([0.2], [0.3]), 4) == pytest.approx(0.3)
        assert _value(self.curve([0.2], [0.3], None, None), 4) == pytest.approx(0.3)
        assert _value(self.curve(None, None), 4) is None

    def test_below_0_counts_as_0(self):
        """A share of explained variance may be -1e9; a mean over budgets must not hang on that."""
        assert _value(self.curve([-1e9], [-1e9], [0.3], [0.3]), 4) == pytest.approx(0.2)

    def test_a_search_may_tell_scores_below_0_apart(self):
        assert _value(self.curve([-1e9], [-0.5], [-0.2], [-0.2]), 4, -1.0) == pytest.approx(-0.3)
        assert _value(self.curve([-1e9], [-1e9], [0.0], [0.0]), 4, -1.0) == pytest.approx(-1 / 3)

    def test_floors_are_medians_once_there_are_four(self):
        curves = [self.curve([0.1], [v], [v], [v]) for v in (0.2, 0.3, 0.6)]
        assert _pruning_thresholds(curves, 4) == (None, None, None, None)
        stopped = self.curve([0.1], [0.4])
        assert _pruning_thresholds([*curves, stopped], 4) == (None, pytest.approx(0.35), None, None)
        assert _pruning_thresholds([*curves, curves[0]], 4) == (None, *[pytest.approx(0.25)] * 3)

    def test_what_is_worse_than_half_is_given_up(self, models, toy):
        """It stops at the first budget at which there is a floor; what is better than most goes on to the end."""
        context = runner(models, toy).context
        curves = [context.curve(Trial("scratch", Pull(rate), SEARCH_SEED)) for rate in (0.3, 0.4, 0.5, 0.6)]
        pruning_thresholds = _pruning_thresholds(curves, len(BUDGETS))
        hopeless = context.curve(Trial("scratch", Pull(1e-6), SEARCH_SEED, pruning_thresholds=pruning_thresholds))
        assert hopeless.budgets == [0, 1]
        lowest = (None, *[0.0] * (len(BUDGETS) - 1))
        assert context.curve(Trial("scratch", Pull(0.3), SEARCH_SEED, pruning_thresholds=lowest)) == curves[0]


class TestAudit:
    """A whole audit whose battery is a search."""

    @pytest.fixture
    def planned(self, monkeypatch):
        """Lets an audit take `Plan` for a search."""
        batteries.list_batteries()  # those of the package are registered while `Search` is the class that they have
        monkeypatch.setitem(batteries.SEARCHES._members, "pull-v1", Plan())
        monkeypatch.setattr(auditing, "Search", Plan)
        monkeypatch.setattr(auditing, "red_flags", lambda *_, **__: [])
        monkeypatch.setattr(batteries, "Search", Plan)

    @pytest.fixture
    def settings(self, models, toy):
        spec = AuditSpec.model_construct(
            **{**AuditSpec(budgets=BUDGETS, seeds=2, trials=7, side_effects=False).__dict__, "battery": "pull-v1"}
        )
        return {
            "immunized": models[0], "original": models[1], "benign": toy, "restricted": toy, "spec": spec,
            "run": Run(0, CPU),
        }  # fmt: skip

    def test_what_was_found_is_repeated_and_scored_on_what_the_search_did_not_see(self, planned, settings, toy):
        result = audit(**settings)
        found = {t.adversary for t in result.search if t.confirmed}
        assert set(result.adversaries) == found
        assert {(c.role, c.adversary, c.seed) for c in result.curves} == {
            (role, name, seed) for role in ROLES for name in found for seed in (0, 1)
        }
        assert SEARCH_SEED not in {c.seed for c in result.curves}
        last = result.by_budget[-1].best["original"]
        unseen = [
            max(
                (sum(f[1::2]) / len(f[1::2]))
                for c in result.curves if c.role == "original" and c.seed == s
                for f in c.folds
            )
            for s in (0, 1)
        ]  # fmt: skip
        assert last.mean <= sum(unseen) / 2 + 1e-12
        assert "that a search (pull-v1, 7 trials a model) found" in result.verdict.threat_model

    def test_resumed(self, planned, settings, tmp_path):
        whole = audit(**settings)
        there = {**settings, "run": Run(0, CPU, tmp_path)}
        assert audit(**there) == whole
        path = tmp_path / "checkpoints" / "trials.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
        assert audit(**there) == whole
        assert Counter(path.read_text().splitlines()) == Counter(lines)


class TestLanguageModels:
    @pytest.fixture(scope="class")
    def subjects(self, tmp_path_factory):
        """A tiny causal model, its own text and a restricted one."""
        place = tmp_path_factory.mktemp("search")
        name = save_causal(place / "llama", num_hidden_layers=2)
        paths = [write_text(place / f"{part}.txt", 40, seed) for seed, part in enumerate(("own", "other"))]
        own, other = (load_task_for(f"{path}@kind=next-token,length=8,test_limit=4", name) for path in paths)
        return load_model(name, own), own, other

    @pytest.mark.parametrize("number", range(len(ADAPTIVE.openings)))
    def test_every_opening_runs_or_says_why_not(self, subjects, run, number):
        model, _, other = subjects
        proposed = adversary({**DEFAULT, **ADAPTIVE.openings[number]})
        reason = proposed.not_applicable(model, other)
        if reason is not None:
            assert reason == "its head takes every position, not a feature vector"
            assert {"standardise", "whiten", "insert"} & set(proposed.undo)
            return
        self.check(proposed, subjects, run)

    @pytest.mark.parametrize("number", range(len(CAUSAL.openings)))
    def test_every_opening_of_their_own_search_runs(self, subjects, run, number):
        model, _, other = subjects
        proposed = CAUSAL.make({**CAUSAL.default, **CAUSAL.openings[number]})
        assert proposed.not_applicable(model, other) is None
        self.check(proposed, subjects, run)

    def test_every_answer_of_their_own_search_can_start(self, subjects):
        model, _, other = subjects
        for opening in (o for own in CAUSAL.answers.values() for o in own):
            assert CAUSAL.make({**CAUSAL.default, **opening}).not_applicable(model, other) is None

    def test_a_search_trains_as_the_audit_says(self):
        plan = AuditSpec(battery="adaptive-causal-v1", precision="bf16", micro_batch=4).plan()
        found = plan.begin(0).ask(len(plan.openings))
        kinds = {a.config()["kind"] for a in found}
        assert kinds == {"finetuning", "directional-ablation", "few-shot-prompt"}
        trained = [a.config() for a in found if a.config()["kind"] != "few-shot-prompt"]
        assert {(c["precision"], c["micro_batch"]) for c in trained} == {("bf16", 4)}
        assert len({a.name for a in found}) == len(found)

    @staticmethod
    def check(proposed, subjects, run):
        model, own, other = subjects
        curve = proposed.attack(model, other, budgets=(0, 1), run=run, benign=own, score_benign=True)
        assert None not in (*curve.scores, curve.losses[1], curve.benign_after)

    @pytest.mark.parametrize("name", ["adaptive-v1", "adaptive-causal-v1"])
    def test_an_audit_searches(self, subjects, run, name, monkeypatch):
        model, own, other = subjects
        monkeypatch.setattr(auditing, "texts_and_measures", lambda *_: ([], []))
        monkeypatch.setattr(auditing, "red_flags", lambda *_, **__: [])
        spec = AuditSpec(battery=name, budgets=(0, 2), seeds=1, trials=4, shots=16, side_effects=False)
        result = audit(model, model, benign=own, restricted=other, spec=spec, run=run)
        assert Counter(t.role for t in result.search) == dict.fromkeys(ROLES, 4)
        found = [t for t in result.search if t.role == "immunized"]
        from_scratch = {t.score for t in result.search if t.role == "scratch"}
        assert name == "adaptive-v1" or len(from_scratch) == 4  # told apart below the unigram model, too
        assert sum(t.confirmed for t in found) >= 3
        assert {c.adversary for c in result.curves} == {t.adversary for t in result.search if t.confirmed}


@pytest.mark.parametrize("name", ["adaptive-v2", "adaptive-causal-v1"])
class TestSpaces:
    """Of the searches that read red flags."""

    def test_every_opening_and_answer_is_a_point_of_the_space(self, name):
        plan = batteries.battery(name)
        openings = [*plan.openings, *(o for own in plan.answers.values() for o in own)]
        for opening in openings:
            point = {**plan.default, **opening}
            assert point.keys() == plan.space.keys()
            rate = plan.space["learning_rate"]
            assert rate.low <= point["learning_rate"] <= rate.high
            assert all(v in plan.space[key].choices for key, v in point.items() if key != "learning_rate")
            plan.make(point)

    def test_every_flag_that_it_answers_exists(self, name):
        assert batteries.battery(name).answers.keys() <= REMEDIES.keys()

    def test_every_point_is_an_adversary(self, name):
        searcher = replace(batteries.battery(name), openings=()).begin(0)
        names = set()
        for _ in range(10):
            found = searcher.ask(10)
            names |= {a.name for a in found}
            searcher.tell([0.0] * 10)
        assert len(names) > 50

    def test_its_openings_are_different_adversaries(self, name):
        plan = batteries.battery(name)
        made = [plan.make({**plan.default, **o}).name for o in plan.openings]
        assert len(set(made)) == len(made)


class TestInformed:
    """`adaptive-v2`."""

    plan = batteries.battery("adaptive-v2")

    def test_what_answers_a_flag_comes_first_and_once(self):
        plain, read = self.plan.reading([]), self.plan.reading(["Dead units", "Unusual scales"])
        answers = [*self.plan.answers["Dead units"], *self.plan.answers["Unusual scales"]]
        assert read.openings[: len(answers)] == tuple(answers)
        points = [str(sorted({**self.plan.default, **o}.items())) for o in read.openings]
        assert len(set(points)) == len(points) == len(plain.openings) == self.plan.opened

    def test_most_of_the_first_trials_are_trained_together(self, models, toy):
        first = [self.plan.make({**self.plan.default, **o}) for o in self.plan.reading([]).openings]
        context = runner(models, toy).context
        trials = [
            Trial(role, a, SEARCH_SEED)
            for role in ROLES
            for a in first[: self.plan.unpruned]
            if a.not_applicable(models[0], toy) is None
        ]
        together = sum(len(group) for group in context.together(trials) if len(group) > 1)
        assert 2 * together >= len(trials)

    def test_an_audit_reads_the_flags(self, monkeypatch, models, toy):
        """A network of dead units is revived in the first trial, against each of the three models."""
        monkeypatch.setattr(
            auditing, "red_flags", lambda *_, **__: [raised("Dead units", "critical", "They are dead.")]
        )
        spec = AuditSpec(budgets=(0, 1), seeds=1, trials=2, battery="adaptive-v2", side_effects=False)
        result = audit(models[0], models[1], benign=toy, restricted=toy, spec=spec, run=Run(0, CPU))
        first = {t.role: t.adversary for t in result.search if t.number == 0}
        assert set(first) == set(ROLES)
        assert all(name.endswith("revive") for name in first.values())
