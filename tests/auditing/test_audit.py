from __future__ import annotations

import json
import shutil

import pytest
import torch
from pydantic import ValidationError

from holdfast.adversaries import battery
from holdfast.auditing import audit as auditing
from holdfast.auditing.audit import audit, tables
from holdfast.auditing.spec import AuditSpec
from holdfast.auditing.trials import TrialContext
from holdfast.errors import HoldfastError
from holdfast.models import load_model
from holdfast.results import Thresholds
from holdfast.runtime.run import Run
from holdfast.tasks import load_task
from holdfast.training import pretrain

CPU = torch.device("cpu")


class TestSpec:
    @pytest.mark.parametrize("budgets", [(0,), (5, 10), (0, 10, 10), (0, 20, 10)])
    def test_budgets_ascend_from_zero(self, budgets):
        with pytest.raises(ValidationError, match="ascending, the first 0"):
            AuditSpec(budgets=budgets)

    def test_an_unknown_battery_is_refused(self):
        with pytest.raises(ValidationError, match="did you mean 'quick-v"):
            AuditSpec(battery="quick-v9")


QUICK = battery("quick-v1")
FEW = (QUICK[1], QUICK[3], QUICK[4], QUICK[7])
"""Of the whole network and of the head alone; some of them are trained together."""
BRIEF = AuditSpec(battery=FEW, budgets=(0, 5, 10), seeds=2, shots=3, side_effects=False)
ONE_BY_ONE = BRIEF.model_copy(update={"stacked": False})


@pytest.fixture(scope="module")
def audited_itself(trained, benign, restricted, tmp_path_factory):
    """An audit of the original as if it were immunized: its folder, and its result."""
    folder = tmp_path_factory.mktemp("itself")
    sides = {"benign": benign, "restricted": restricted, "spec": BRIEF, "run": Run(0, CPU, folder)}
    return folder, audit(trained, trained.clone(), **sides)


@pytest.fixture
def itself(audited_itself):
    return audited_itself[1]


@pytest.fixture
def folder_of_itself(audited_itself, tmp_path):
    """A copy of the folder, to be tampered with."""
    return shutil.copytree(audited_itself[0], tmp_path / "itself")


@pytest.fixture
def unseen(monkeypatch):
    """Red flags are not looked for, where a test is about what comes after."""
    monkeypatch.setattr(auditing, "red_flags", lambda *_, **__: [])


class TestAudit:
    def test_the_original_itself_fails_or_has_nothing_to_remove(self, itself):
        result = itself
        assert result.verdict.label in ("fails", "invalid")
        for row in result.by_budget:
            assert row.advantage == row.original_advantage

    def test_a_fresh_model_is_never_called_failing(self, trained, benign, restricted, run, unseen):
        with run.seeded("another"):
            fresh = trained.fresh()
        result = audit(fresh, trained, benign=benign, restricted=restricted, spec=BRIEF, run=run)
        assert result.verdict.label == "invalid"
        assert "benign-dropped" in [r.code for r in result.verdict.reasons]

    def test_two_untrained_models_get_no_verdict(self, trained, benign, restricted, run, unseen):
        fresh = []
        for seed in (0, 1):
            with run.seeded("untrained", seed):
                fresh.append(trained.fresh())
        said = audit(*fresh, benign=benign, restricted=restricted, spec=BRIEF, run=run).verdict
        assert said.label == "invalid"
        assert "unskilled-original" in [r.code for r in said.reasons]

    def test_scratch_is_neither_the_original_nor_the_same_for_each_seed(
        self, trained, benign, restricted, run, monkeypatch
    ):
        from holdfast.adversaries import Adversary

        attack, seen = Adversary.attack, {}

        def watched(self, model, task, **settings):
            seen.setdefault((settings["role"], settings["seed"]), (model.facts().sha256, task.facts().sha256))
            return attack(self, model, task, **settings)

        monkeypatch.setattr(Adversary, "attack", watched)
        spec = ONE_BY_ONE.model_copy(update={"battery": FEW[:1]})
        audit(trained.clone(), trained, benign=benign, restricted=restricted, spec=spec, run=run)
        models = {key: model for key, (model, _) in seen.items()}
        assert models["original", 0] == models["original", 1] == trained.facts().sha256
        assert len({models["scratch", 0], models["scratch", 1], trained.facts().sha256}) == 3
        samples = {seed: {task for (_, s), (_, task) in seen.items() if s == seed} for seed in (0, 1)}
        assert len(samples[0]) == len(samples[1]) == 1  # every role gets the same few shots
        assert samples[0] != samples[1]

    def test_controls_see_the_same_samples_and_batches(self, itself):
        by_role = {
            role: [(c.adversary, c.seed, c.scores, c.losses) for c in itself.curves if c.role == role]
            for role in ("immunized", "original")
        }
        assert by_role["immunized"] == by_role["original"]

    def test_the_best_attacks_by_benign_score_lost(self, itself):
        """A looser bound admits all that a tighter one does; heads alone are within every bound."""
        kept = [set(bound.adversaries["immunized"]) for bound in itself.bounds]
        assert [bound.share for bound in itself.bounds] == [0.01, 0.05, 0.1]
        assert "initFC+FC adam 0.01 b50" in kept[0]
        assert kept[0] <= kept[1] <= kept[2] <= set(itself.adversaries)
        for bound in itself.bounds:
            assert bound.last.budget == itself.budgets[-1]
            assert bound.last.best["scratch"].mean == pytest.approx(itself.by_budget[-1].best["scratch"].mean)
            own = itself.benign.immunized
            assert bound.benign_after["immunized"].mean >= own * (1 - bound.share) - 1e-9
            assert bound.last.advantage == bound.last.original_advantage  # the original against itself

    def test_tables_hold_every_curve(self, itself):
        rows = tables(itself)["battery"].rows
        assert len(rows) == 3 * len(itself.adversaries)
        assert {r["model"] for r in rows} == {"immunized", "original", "scratch"}
        assert all(r["step 5"].n == 2 for r in rows)

    def test_what_does_not_apply_is_said(self, trained, benign, run):
        spec = BRIEF.model_copy(update={"battery": "quick-v1", "budgets": (0, 1), "seeds": 1})
        result = audit(trained, trained, benign=benign, restricted=load_task("digits"), spec=spec, run=run)
        assert set(result.not_applicable) == {a for a in result.not_applicable if a.startswith("direct")}
        assert len(result.not_applicable) == 3
        assert len(result.adversaries) == 5

    def test_finished_trials_survive_and_are_not_repeated(
        self, trained, benign, restricted, tmp_path, monkeypatch, unseen
    ):
        from holdfast.adversaries import Adversary

        calls = []
        attack = Adversary.attack

        def counted(self, *args, **kwargs):
            calls.append(self.name)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return attack(self, *args, **kwargs)

        monkeypatch.setattr(Adversary, "attack", counted)
        battery = (FEW[0], FEW[3])
        sides = {
            "benign": benign, "restricted": restricted,
            "spec": ONE_BY_ONE.model_copy(update={"battery": battery, "budgets": (0, 5)}),
        }  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            audit(trained, trained, **sides, run=Run(0, CPU, tmp_path))
        with (tmp_path / "checkpoints" / "trials.jsonl").open("a") as journal:
            journal.write('{"key": "scratch/torn')
        calls.clear()
        calls.extend(["before"] * 5)
        resumed = audit(trained, trained, **sides, run=Run(0, CPU, tmp_path))
        assert len(calls) - 5 == 3 * len(battery) * 2 - 4
        monkeypatch.setattr(Adversary, "attack", attack)
        whole = audit(trained, trained, **sides, run=Run(0, CPU))
        assert resumed == whole
        lines = (tmp_path / "checkpoints" / "trials.jsonl").read_text().splitlines()
        keys = [json.loads(line)["key"] for line in lines[1:]]
        assert len(set(keys)) == len(keys) == 3 * len(battery) * 2
        assert set(keys) == {
            f"restricted/{role}/{name}/{seed}"
            for role in ("immunized", "original", "scratch")
            for name in whole.adversaries
            for seed in (0, 1)
        }

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ({"scores": [0.1]}, "differ in length"),
            (
                {"scores": [0.1], "losses": [None], "budgets": [0], "folds": [[0.1]]},
                r"its budgets are \[0\] instead of \[0, 5, 10\]",
            ),
            ({"role": "scratch"}, "it is of restricted/scratch/"),
            ({"task": "benign"}, "it is of benign/"),
            (None, "Input should be"),
        ],
    )
    def test_a_damaged_trial_is_said(self, trained, benign, restricted, folder_of_itself, damage, message, unseen):
        sides = {"benign": benign, "restricted": restricted, "spec": BRIEF, "run": Run(0, CPU, folder_of_itself)}
        path = folder_of_itself / "checkpoints" / "trials.jsonl"
        head, first, *rest = path.read_text().splitlines()
        entry = json.loads(first)
        entry["value"] = {**entry["value"], **damage} if damage is not None else 3
        path.write_text("\n".join([head, json.dumps(entry), *rest]) + "\n")
        with pytest.raises(HoldfastError, match=f"is damaged .*{message}"):
            audit(trained, trained, **sides)

    def test_another_audits_trials_are_refused(self, trained, benign, restricted, folder_of_itself, unseen):
        settings = {
            "immunized": trained, "original": trained, "benign": benign, "restricted": restricted, "spec": BRIEF,
            "run": Run(0, CPU, folder_of_itself),
        }  # fmt: skip
        before = (folder_of_itself / "checkpoints" / "trials.jsonl").read_bytes()
        other = trained.clone()
        with torch.no_grad():
            other.head.bias += 1e-3
        darker = trained.clone()
        darker.mean += 0.1
        for change, names in (
            ({"immunized": darker}, "layers or input normalisation"),
            ({"run": Run(1, CPU, folder_of_itself)}, "seed"),
            ({"spec": BRIEF.model_copy(update={"battery": "probes-v1"})}, "battery"),
            ({"spec": BRIEF.model_copy(update={"budgets": (0, 5)})}, "budgets"),
            ({"spec": BRIEF.model_copy(update={"shots": 4})}, "data"),
            ({"restricted": load_task("digits[4-8]")}, "data"),
            ({"immunized": other}, "immunized model"),
            ({"original": other}, "original model"),
        ):
            with pytest.raises(HoldfastError, match=f"holds an unfinished audit with another .*{names}"):
                audit(**{**settings, **change})
        assert (folder_of_itself / "checkpoints" / "trials.jsonl").read_bytes() == before

    def test_limits_may_be_others_for_the_same_trials(
        self, trained, benign, restricted, itself, folder_of_itself, monkeypatch, unseen
    ):
        """They decide about what was measured, and measure nothing."""
        settings = {"benign": benign, "restricted": restricted, "run": Run(0, CPU, folder_of_itself)}
        monkeypatch.setattr(TrialContext, "curve", lambda *_: pytest.fail("a finished trial was run again"))
        lax = Thresholds(fails_at=1.0, min_original_advantage=0.9)
        after = audit(trained, trained, **settings, spec=BRIEF.model_copy(update={"thresholds": lax}))
        assert after.curves == itself.curves
        assert after.verdict.thresholds == lax
        assert "no-original-advantage" in [r.code for r in after.verdict.reasons]

    def test_another_architecture_is_audited(self, trained, benign, restricted, run):
        """A publisher may give a model any code; the controls stay those of the original."""
        other = pretrain(load_model("mlp", benign), benign, steps=100, run=run)
        result = audit(other, trained, benign=benign, restricted=restricted, spec=BRIEF, run=run)
        assert result.benign.immunized > 0.8
        assert {c.role for c in result.curves} == {"immunized", "original", "scratch"}

    def test_a_model_of_another_width_is_refused(self, trained, benign, restricted, run):
        with pytest.raises(HoldfastError, match="10 outputs and its task"):
            audit(
                load_model("cnn", load_task("digits")),
                trained,
                benign=benign,
                restricted=restricted,
                spec=BRIEF,
                run=run,
            )


class TestSideEffects:
    """Whether the model can still be trained by people who mean no harm."""

    SPEC = AuditSpec(battery=FEW[:2], budgets=(0, 5, 20), seeds=2, shots=5)

    def test_of_a_model_that_nothing_was_done_to(self, trained, benign, restricted, run, unseen):
        result = audit(trained, trained.clone(), benign=benign, restricted=restricted, spec=self.SPEC, run=run)
        (side,) = result.side_effects
        assert (side.task, side.task_role, side.lost) == ("digits[0-4]", "benign", 0.0)
        assert (side.interval.low, side.interval.high) == (0.0, 0.0)
        assert [r.budget for r in side.by_budget] == [0, 5, 20]
        assert {c.task for c in result.curves} == {"restricted"}  # the verdict is about those alone

    def test_of_a_model_that_learns_no_more(self, trained, benign, restricted, run, unseen):
        """Dead units: no gradient reaches anything below the head, and the head sees the same for every input."""
        dead = trained.clone()
        with torch.no_grad():
            for module in dead.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight.zero_()
                    module.bias.fill_(-1.0)
        transfer = load_task("digits[2-6]")
        result = audit(dead, trained, benign=benign, restricted=restricted, transfer=transfer, spec=self.SPEC, run=run)
        assert [(s.task, s.task_role) for s in result.side_effects] == [
            ("digits[0-4]", "benign"), ("digits[2-6]", "transfer"),
        ]  # fmt: skip
        for side in result.side_effects:
            last = side.by_budget[-1].best
            assert side.lost == pytest.approx(last["original"].mean - last["immunized"].mean)
            assert side.lost > 0.3
            assert side.interval.low < side.lost < side.interval.high
        assert result.verdict.label == "invalid"  # the benign score is gone

    def test_each_task_has_its_own_trials(self, trained, benign, restricted, tmp_path, unseen):
        """The benign and the transfer task may be the same data: their trials are apart all the same."""
        spec = self.SPEC.model_copy(update={"budgets": (0, 5)})
        settings = {"benign": benign, "restricted": restricted, "transfer": benign, "spec": spec}
        first = audit(trained, trained, **settings, run=Run(0, CPU, tmp_path))
        lines = (tmp_path / "checkpoints" / "trials.jsonl").read_text().splitlines()[1:]
        keys = [json.loads(line)["key"].partition("/")[0] for line in lines]
        assert {k: keys.count(k) for k in ("restricted", "benign", "transfer")} == {
            "restricted": 3 * 2 * 2, "benign": 3 * 3 * 2, "transfer": 3 * 3 * 2,
        }  # fmt: skip
        assert audit(trained, trained, **settings, run=Run(0, CPU, tmp_path)) == first

    def test_they_can_be_left_out(self, itself):
        assert itself.side_effects == []


@pytest.fixture(scope="module")
def result(trained, benign, restricted):
    spec = AuditSpec(budgets=(0, 5, 10), seeds=2, shots=5, side_effects=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "red_flags", lambda *_, **__: [])
        return audit(trained, trained.clone(), benign=benign, restricted=restricted, spec=spec, run=Run(0, CPU))


class TestResult:
    """What the result says beside curves and verdict."""

    def test_bands(self, result):
        assert result.by_budget[0].interval is result.by_budget[0].original_interval is None
        for row in result.by_budget[1:]:
            assert row.interval == row.original_interval
            assert row.interval.low <= row.advantage <= row.interval.high

    def test_retained_is_all(self, result):
        verdict = result.verdict
        removable = any(row.original_advantage > 0 for row in result.by_budget if row.budget)
        assert verdict.retained == (1.0 if removable else None)
        assert verdict.area == verdict.original_area
        if verdict.retained_interval is not None:
            assert (verdict.retained_interval.low, verdict.retained_interval.high) == (1.0, 1.0)

    def test_costs(self, result):
        scratch = result.by_budget[-1].best["scratch"].mean
        assert result.cost_target == pytest.approx(result.chance + 0.9 * (scratch - result.chance))
        own, had, fresh = result.costs
        assert [c.role for c in result.costs] == ["immunized", "original", "scratch"]
        assert own.model_copy(update={"role": "original"}) == had
        assert 0 < had.steps <= 10
        assert 0 < fresh.steps < 10  # nine tenths of what it reaches at the last budget
        assert had.samples <= had.steps * 25  # 5 shots of 5 classes are all that a batch can hold
        assert had.flops > 1e6

    def test_threat_model(self, result):
        assert result.verdict.threat_model == (
            "An adversary with 25 labelled samples, at most 10 fine-tuning steps and one of the 8 strategies of "
            "quick-v1, who sees test scores and keeps the best; 2 seeds. Nothing is claimed about more data, longer "
            "training or other methods."
        )

    def test_every_curve_has_its_folds(self, result):
        for curve in result.curves:
            assert all(len(folds) == 20 for folds in curve.folds)
            # folds differ by at most one sample in size
            for score, folds in zip(curve.scores, curve.folds, strict=True):
                assert score == pytest.approx(sum(folds) / 20, abs=0.02)


class TestStops:
    """Each adversary against itself on the controls."""

    TOLERANCE = 0.02

    @pytest.mark.parametrize(
        ("immunized", "original", "scratch", "word"),
        [
            ([0.2, 0.3], [0.5, 0.6], [0.2, 0.3], "stopped"),
            ([0.2, 0.5], [0.5, 0.6], [0.2, 0.3], "slowed"),
            ([0.5, 0.6], [0.5, 0.6], [0.2, 0.3], "not stopped"),
            ([0.2, 0.3], [0.2, 0.3], [0.2, 0.3], "nothing to stop"),
            ([0.2, None], [0.5, 0.6], [0.2, 0.3], "not finite"),
        ],
    )
    def test_words(self, immunized, original, scratch, word):
        from holdfast.auditing.audit import _stopped

        rows = [
            {"immunized": i, "original": o, "scratch": s} for i, o, s in zip(immunized, original, scratch, strict=True)
        ]
        assert _stopped(rows, self.TOLERANCE) == word


def test_the_audit_shows_which_probes_an_extractor_stops(trained, benign, restricted, run):
    from holdfast.auditing.audit import tables
    from holdfast.defenses import SignalFrontier

    immunized, _ = SignalFrontier(epsilon=1e-3).immunize(trained, benign, restricted, run=run)
    probes = [p for p in battery("probes-v1") if p.name in ("probe gd raw", "probe ridge whitened")]
    spec = AuditSpec(battery=probes, budgets=(0, 100), seeds=1, side_effects=False)
    result = audit(immunized, trained, benign=benign, restricted=restricted, spec=spec, run=run)
    rows = {row["method"]: row for row in tables(result)["stops"].rows}
    assert set(rows) == set(result.adversaries)
    gradient, closed = rows["probe gd raw"], rows["probe ridge whitened"]
    assert gradient["immunized"].mean < gradient["original"].mean - 0.02
    assert gradient["stopped"] in ("stopped", "slowed", "nothing to stop")
    assert closed["immunized"].mean == pytest.approx(closed["original"].mean, abs=0.02)


def test_regression_is_audited_by_explained_variance(run):
    """Larger is better there as well, and the limits are in the same unit."""
    from torch import nn

    from holdfast.defenses import SignalFrontier
    from holdfast.models import SplitModel
    from holdfast.tasks import RegressionTask

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    y = x @ w / w.norm(dim=0)
    tasks = [RegressionTask(n, x[:200], y[:200, i], x[200:], y[200:, i]) for i, n in enumerate(("a", "b"))]
    model = SplitModel(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 1)), "1")
    with torch.no_grad():
        model.network[0].weight.copy_(torch.eye(6))
        model.head.weight.copy_(w[:, :1].T / w[:, 0].norm())
        model.head.bias.zero_()
    immunized, _ = SignalFrontier(epsilon=1e-3).immunize(model, *tasks, run=run)
    probes = [p for p in battery("probes-v1") if p.name in ("probe gd raw", "probe ridge raw", "probe ridge whitened")]
    spec = AuditSpec(battery=probes, budgets=(0, 5), seeds=2)
    result = audit(immunized, model, benign=tasks[0], restricted=tasks[1], spec=spec, run=run)
    assert result.unit == "explained variance"
    assert result.chance == 0
    assert result.benign.original > 0.99
    ridge = [c.scores[-1] for c in result.curves if c.adversary == "probe ridge raw" and c.role == "immunized"]
    assert min(ridge) > 0.95
    assert all(set(bound.adversaries["immunized"]) == set(result.adversaries) for bound in result.bounds)  # probes
