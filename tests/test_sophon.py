"""What SOPHON has here beyond the paper: a wider Phi, lives, probes, distillation, exact gradients, validation."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch
from torch import nn

import reference
from cases import DEFENSES
from conftest import toy_task
from holdfast.adversaries import FineTuning
from holdfast.adversaries.batteries import BATTERIES
from holdfast.defenses import Sophon, guarded, sophon
from holdfast.defenses.population import Population
from holdfast.defenses.second_order import MOMENTUM, ExactSimulation
from holdfast.defenses.simulation import Simulation
from holdfast.defenses.sophon import distillation_loss
from holdfast.defenses.validation import VALIDATION, validation_score
from holdfast.errors import HoldfastError
from holdfast.execution import Run
from holdfast.finetune import Strategy
from holdfast.models import SplitModel, load_model
from holdfast.suppression import Objective, inverse_cross_entropy, ridge_probe
from holdfast.tasks import load_task

CPU = torch.device("cpu")
EVERYTHING = 10_000
"""A batch size that takes the whole training split, so that the order of samples matters in the last digits alone."""


@pytest.fixture
def task():
    task = toy_task(3)
    task._x = {s: v.double() for s, v in task._x.items()}
    return task


@pytest.fixture
def small():
    torch.manual_seed(0)
    return SplitModel(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double(), "4"
    )


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b, strict=True))


class TestPhi:
    def test_is_the_product_of_its_settings(self):
        settings = Sophon(initialisations=("head", "last-block"), scopes=("all", "norm"), optimizers=("adam", "sgd"),
                          learning_rates=(0.1,), batch_sizes=(5, 6))  # fmt: skip
        assert len(set(settings.phi())) == 2 * 2 * 2 * 1 * 2

    def test_written_out_it_replaces_the_product(self):
        strategies = (Strategy("head"), Strategy("direct", "all", "momentum", 0.1, 5))
        assert Sophon(strategies=strategies).phi() == list(strategies)

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"scopes": ("lora",)}, "adapters are not in the model"),
            ({"strategies": (Strategy(scope="lora"),)}, "adapters are not in the model"),
            ({"strategies": ()}, "strategies is empty"),
            ({"scopes": ()}, "scopes is empty"),
            ({"tasks": 3, "population": 2}, "population is 2 and tasks 3"),
            ({"lifetime": 0}, "lifetime is 0"),
            ({"probe_weight": -1.0}, "probe_weight is -1.0"),
            ({"distillation": math.nan}, "distillation is nan"),
            ({"loss": "none"}, "nothing is suppressed"),
            ({"precision": "fp8"}, "precision"),
            ({"second_order": True}, "exact meta-gradient is for adversaries"),
            ({"second_order": True, "optimizers": ("sgd",), "lifetime": 2}, "goes without lifetime"),
            ({"validate_every": 0}, "validate_every is 0"),
            ({"validation_steps": 1}, "validation_steps is 1"),
        ],
    )
    def test_refuses_what_cannot_work(self, settings, match):
        with pytest.raises(HoldfastError, match=match):
            Sophon(**settings)


class TestSimulation:
    @pytest.mark.parametrize(
        ("start", "moved"),
        [("direct", [0, 2, 4]), ("head", [0, 2]), ("last-block", [0]), ("last-half", [0])],
    )
    def test_what_starts_anew_gets_no_gradient(self, small, task, start, moved):
        simulation = Simulation(small, inverse_cross_entropy)
        simulation.run(task, Strategy(start, batch_size=10), 2, None, generator=stream())
        names = [n for n, _ in small.network.named_parameters()]
        reached = {int(n.split(".")[0]) for n, g in zip(names, simulation.gradients(), strict=True) if g is not None}
        assert sorted(reached) == moved

    @pytest.mark.parametrize("scope", ["head", "last-block"])
    def test_what_the_adversary_freezes_is_moved_all_the_same(self, small, task, scope):
        """Eq. 4 differentiates by theta, whether the adversary trains it or not; at a rate of about 0 scopes agree."""

        def gradient(which):
            simulation = Simulation(small, inverse_cross_entropy)
            simulation.run(task, Strategy("direct", which, "sgd", 1e-14, 10), 2, None, generator=stream())
            return simulation.gradient

        assert close(gradient(scope), gradient("all"))
        assert all(p.requires_grad for p in small.parameters())

    def test_the_probe_counts_once_a_step(self, small, task):
        gamma, weight = (0.5, 2.0), 0.7

        def gradient(objective):
            simulation = Simulation(small, objective)
            seen = simulation.run(
                task, Strategy("direct", "all", "sgd", 1e-14, EVERYTHING), 2, gamma, generator=stream()
            )
            return simulation.gradient, seen.loss

        both, loss = gradient(Objective(inverse_cross_entropy, weight, 0.1, EVERYTHING))
        plain, plain_loss = gradient(Objective(inverse_cross_entropy))
        x, y = (torch.from_numpy(v) if not torch.is_tensor(v) else v for v in (task._x["train"], task._y["train"]))
        share = reference.ridge_probe(small.features(x), y, 0.1)
        expected = torch.autograd.grad(share, list(small.parameters()), allow_unused=True)
        added = [torch.zeros_like(p) if g is None else weight * sum(gamma) * g
                 for g, p in zip(expected, plain, strict=True)]  # fmt: skip
        assert all(torch.allclose(b - p, a, rtol=1e-6, atol=1e-9) for b, p, a in zip(both, plain, added, strict=True))
        assert loss - plain_loss == pytest.approx(weight * float(share), rel=1e-5)

    def test_bf16_trains_as_float32_does(self, restricted):
        """Autocast must not go on with the weights of the first step."""
        torch.manual_seed(0)
        model = load_model("cnn", restricted)

        def accuracy(bf16):
            simulation = Simulation(model, inverse_cross_entropy, bf16=bf16)
            strategy = Strategy("head", "all", "adam", 1e-2, 60)
            return simulation.run(restricted, strategy, 30, None, generator=stream()).accuracy

        whole = accuracy(False)
        assert whole > 0.9
        assert accuracy(True) > whole - 0.1
        assert model.dtype == torch.float32

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    def test_compiled_it_computes_the_same(self, small, task):
        def gradient(compiled):
            simulation = Simulation(small, inverse_cross_entropy, compiled=compiled)
            for start in ("direct", "head"):
                torch.manual_seed(1)
                simulation.run(task, Strategy(start, batch_size=10), 2, None, generator=stream())
            return simulation.gradient

        assert close(gradient(True), gradient(False))

    def test_evaluated_on_the_other_half_what_was_learned_by_heart_does_not_count(self, model, benign, restricted, run):
        seen = []

        class Spied(Simulation):
            def _simulate(self, adversary, task, steps, gamma, generator, evaluation):
                seen.append([{x.numpy().tobytes() for x in t._x["train"]} for t in (task, evaluation)])
                return super()._simulate(adversary, task, steps, gamma, generator, evaluation)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sophon, "Simulation", Spied)
            for disjoint in (True, False):
                Sophon(iterations=1, steps=1, disjoint=disjoint).immunize(model, benign, restricted, run=run)
        (learned, evaluated), (same, also) = seen
        assert not learned & evaluated
        assert learned | evaluated == same == also


class TestExactGradient:
    @pytest.mark.parametrize("optimizer", MOMENTUM)
    def test_is_the_derivative_of_equation_4(self, small, task, optimizer):
        """Central differences of the whole objective: fine-tuning by hand from a shifted theta."""
        gamma, rate = [0.5, 1.0, 2.0], 0.3
        simulation = ExactSimulation(small, inverse_cross_entropy)
        strategy = Strategy("direct", "all", optimizer, rate, EVERYTHING)
        simulation.run(task, strategy, len(gamma), tuple(gamma), generator=stream())

        x, y = task._x["train"], task._y["train"]
        names = [n for n, _ in small.named_parameters()]

        def logits(parameters):
            return torch.func.functional_call(small, dict(zip(names, parameters, strict=True)), x)

        def objective(theta):
            return float(
                reference.meta_objective(
                    lambda p, _: nn.functional.cross_entropy(logits(p), y), lambda p, _: reference.ice(logits(p), y),
                    theta, gamma, rate, MOMENTUM[optimizer], optimizer == "nesterov",
                ).detach()
            )  # fmt: skip

        theta = [p.detach().clone() for p in small.parameters()]
        torch.manual_seed(0)
        for _ in range(4):
            direction = [torch.randn_like(p) for p in theta]
            h = 1e-5
            ends = [objective([p + s * h * d for p, d in zip(theta, direction, strict=True)]) for s in (1, -1)]
            along = sum(float((g * d).sum()) for g, d in zip(simulation.gradient, direction, strict=True))
            assert along == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)

    def test_the_first_order_is_its_limit_for_small_rates(self, small, task):
        def gap(rate):
            both = []
            for kind in (Simulation, ExactSimulation):
                simulation = kind(small, inverse_cross_entropy)
                simulation.run(task, Strategy("direct", "all", "sgd", rate, EVERYTHING), 3, None, generator=stream())
                both.append(torch.cat([g.flatten() for g in simulation.gradient]))
            return float((both[0] - both[1]).norm() / both[1].norm())

        assert gap(0.3) > 0.01  # they do differ
        assert gap(1e-3) / gap(1e-4) == pytest.approx(10, rel=0.05)  # by O(rate)

    def test_leaves_the_model_and_its_statistics(self, model, restricted):
        digest = model.facts().sha256
        simulation = ExactSimulation(model, inverse_cross_entropy)
        simulation.run(restricted, Strategy("direct", "all", "sgd", 0.01, 20), 2, None, generator=stream())
        assert model.facts().sha256 == digest
        assert any(float(g.abs().sum()) > 0 for g in simulation.gradient)


class TestPopulation:
    def population(self, model, strategy, **settings):
        return Population(model, Objective(inverse_cross_entropy), [strategy], **settings)

    @pytest.mark.parametrize("start", ["direct", "head"])
    def test_an_adversary_that_lives_on_goes_the_same_way_as_a_longer_simulation(self, small, task, start):
        strategy = Strategy(start, "all", "adam", 1e-2, EVERYTHING)
        torch.manual_seed(1)
        population = self.population(small, strategy, lifetime=10)
        population.living.clear()
        population._unborn.clear()  # the first life is as long as the others
        for _ in range(3):
            population.loop(task, 1, 4, None, generator=stream())
        lasting = population.living[0]
        population.simulations[0]._move(lasting, 1.0)

        torch.manual_seed(1)
        once = Simulation(small, inverse_cross_entropy)
        adversary = once.start(strategy, task)
        once._simulate(adversary, task, 12, None, stream(), task)
        assert lasting.loops == 3
        assert close(lasting.model.parameters(), adversary.model.parameters())

    def test_at_rest_it_moves_with_the_model_but_for_what_it_started_anew(self, small, task):
        population = self.population(small, Strategy("head", "all", "adam", 1e-2, 20), size=2, lifetime=8)
        population.turn = 1  # the second one has a first life of several loops
        population.loop(task, 1, 2, None, generator=stream())
        adversary = population.living[1]
        simulation = population.simulations[0]

        def awake():
            simulation._move(adversary, 1.0)
            values = [p.detach().clone() for p in adversary.model.parameters()]
            simulation._move(adversary, -1.0)
            return values

        before = awake()
        with torch.no_grad():
            for p in small.parameters():
                p.add_(0.25)
        shifts = [float((b - a).mean()) for a, b in zip(before, awake(), strict=True)]
        assert shifts == pytest.approx([0.25] * 4 + [0.0] * 2)

    def test_lives_end_one_after_the_other(self, small, task):
        population = self.population(small, Strategy("head", batch_size=20), size=4, lifetime=8)
        lives = []
        for _ in range(40):
            population.loop(task, 1, 1, None, generator=stream())
            lives.append({slot: (a.loops, a.life) for slot, a in population.living.items()})
        assert [lives[i].get(i, (1, 1))[1] for i in range(4)] == [1, 3, 5, 7]
        assert {life for later in lives[32:] for _, life in later.values()} == {8}
        assert len({loops for loops, _ in lives[-1].values()}) > 1

    def test_two_devices_collect_what_one_does(self, small, task):
        def gradients(devices):
            population = self.population(small, Strategy("direct", batch_size=20), size=5, lifetime=3, devices=devices)
            for _ in range(3):
                seen = population.loop(task, 3, 2, None, generator=stream(4))
            return population.gradients(), seen

        (one, seen), (two, seen_by_two) = gradients(()), gradients((CPU, CPU))
        assert close(one, two)
        assert [s.loss for s in seen] == pytest.approx([s.loss for s in seen_by_two])

    def test_the_guard_ends_all_lives_when_it_goes_back(self, model, benign, restricted, run, monkeypatch):
        cleared = []
        monkeypatch.setattr(Population, "clear", lambda self, old=Population.clear: (cleared.append(1), old(self))[1])
        violent = Sophon(iterations=3, steps=2, suppression_lr=0.5, guard_every=1, batch_sizes=(20,), clip=None,
                         lifetime=5, max_benign_drop=0.0, reinforcement_lr=1e-6)  # fmt: skip
        _, record = violent.immunize(trained_on(benign), benign, restricted, run=run)
        assert len(cleared) == 1 + sum("back to the last good state" in e.message for e in record.events) > 1


def trained_on(task):
    from holdfast.pipeline import pretrain

    torch.manual_seed(0)
    return pretrain(load_model("cnn", task), task, steps=60)


class TestRecovery:
    def made(self, benign, restricted, run, **more):
        harsh = Sophon(iterations=4, steps=2, suppression_lr=0.05, guard_every=1, batch_sizes=(20,), clip=None,
                       reinforcement_loops=1, max_benign_drop=0.1, **more)  # fmt: skip
        return harsh.immunize(trained_on(benign), benign, restricted, run=run)

    def test_reinforcement_brings_the_score_back_at_the_same_rate(self, benign, restricted, run):
        _, without = self.made(benign, restricted, run)
        assert any("halved" in e.message for e in without.events)
        _, record = self.made(benign, restricted, run, recovery_loops=60, reinforcement_lr=5e-3)
        assert any("brought back to" in e.message for e in record.events)
        assert not any("halved" in e.message for e in record.events)
        assert max(record.history["gradient_passes"]) == 2 * 2 + 1 + 60

    def test_what_it_does_not_bring_back_goes_back(self, benign, restricted, run):
        _, record = self.made(benign, restricted, run, recovery_loops=1, reinforcement_lr=1e-9)
        assert any("halved" in e.message for e in record.events)


class TestDistillation:
    def test_is_zero_at_the_teacher_and_has_its_gradient_there(self):
        teacher = torch.randn(4, 5, dtype=torch.float64, generator=stream())
        logits = (teacher + 3).requires_grad_()  # softmax does not see the shift
        loss = distillation_loss(logits, teacher, 2.0)
        assert loss.abs() < 1e-12
        assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12

    def test_is_the_divergence_times_the_square_of_the_temperature(self):
        logits, teacher = torch.randn(2, 4, 5, dtype=torch.float64, generator=stream())
        p, q = (torch.softmax(z / 3.0, -1) for z in (teacher, logits))
        expected = 9 * (p * (p / q).log()).sum(-1).mean()
        assert torch.allclose(distillation_loss(logits, teacher, 3.0), expected)

    def test_holds_the_answers_on_benign_images(self, benign, restricted, run):
        original = trained_on(benign)
        x = next(benign.sweep("test", 1000, device=CPU)).x

        def moved(weight):
            settings = {
                "iterations": 4,
                "steps": 3,
                "suppression_lr": 3e-3,
                "batch_sizes": (20,),
                "max_benign_drop": 1.0,
            }
            made, _ = Sophon(distillation=weight, reinforcement_loops=6, **settings).immunize(
                original, benign, restricted, run=run
            )
            with torch.no_grad():
                return float(distillation_loss(made(x), original(x), 1.0))

        assert moved(10.0) < moved(0.0)


class TestValidation:
    @pytest.mark.parametrize("battery", BATTERIES)
    def test_its_attacks_are_in_no_battery(self, battery):
        strategies = {a.strategy for a in BATTERIES[battery] if isinstance(a, FineTuning)}
        assert not strategies & set(VALIDATION)
        assert not {(s.optimizer, s.learning_rate) for s in strategies} & {
            (s.optimizer, s.learning_rate) for s in VALIDATION
        }

    def test_a_model_that_knows_the_task_scores_higher(self, restricted, run):
        torch.manual_seed(0)
        model = load_model("cnn", restricted)
        assert validation_score(trained_on(restricted), restricted, 6, run=run) > validation_score(
            model, restricted, 6, run=run
        )

    def test_the_same_model_gets_the_same_score(self, model, restricted, run):
        digest = model.facts().sha256
        scores = {validation_score(model, restricted, 4, run=run) for _ in range(2)}
        assert len(scores) == 1
        assert model.facts().sha256 == digest

    def test_the_best_state_is_kept(self, model, benign, restricted, run, monkeypatch):
        """Scores fall, then rise: what comes back is the model of the lowest one."""
        scores, states = iter([0.5, 0.2, 0.4]), []

        def scored(model, *_, **__):
            states.append(model.facts().sha256)
            return next(scores)

        monkeypatch.setattr(guarded, "validation_score", scored)
        settings = Sophon(iterations=3, steps=1, validate_every=1, max_benign_drop=1.0)
        made, record = settings.immunize(model, benign, restricted, run=run)
        assert len(set(states)) == 3
        assert made.facts().sha256 == states[1]
        assert record.history["validation_score"] == [0.5, 0.2, 0.4]
        assert "kept the state after round 2" in record.events[-1].message

    def test_nothing_of_the_examined_samples_is_trained_on(self, model, benign, restricted, run, monkeypatch):
        seen = []
        monkeypatch.setattr(guarded, "validation_score", lambda model, task, *_, **__: seen.append(task) or 0.5)
        Sophon(iterations=1, steps=1, validate_every=1, max_benign_drop=1.0).immunize(
            model, benign, restricted, run=run
        )
        train, test = ({bytes(x.numpy().tobytes()) for x in seen[0]._x[s]} for s in ("train", "test"))
        everything = {bytes(x.numpy().tobytes()) for x in restricted._x["train"]}
        assert not train & test
        assert train | test <= everything
        assert len(test) == pytest.approx(guarded.VALIDATION_SHARE * len(everything), rel=0.1)


class TestCheckpoints:
    def test_the_state_is_saved_between_looks_when_time_has_passed(
        self, model, benign, restricted, tmp_path, monkeypatch
    ):
        saves = []
        monkeypatch.setattr(guarded, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(guarded, "save_tensors", lambda path, tensors, meta: saves.append(meta["round"]))
        settings = Sophon(iterations=4, steps=1, guard_every=100)
        settings.immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))
        assert saves == [1, 2, 3, 4]

    def test_progress_knows_the_simulated_score(self, model, benign, restricted, run):
        _, record = dataclasses.replace(DEFENSES["sophon-lasting"]).immunize(model, benign, restricted, run=run)
        assert all(0 <= s <= 1 for s in record.history["simulated_score"])


def test_ridge_probe_is_computed_through_the_smaller_gram(task):
    """Both sides of the push-through identity."""
    for n, d in ((20, 4), (20, 60)):
        z, y = torch.randn(n, d, dtype=torch.float64, generator=stream()), torch.arange(n) % 3
        assert torch.allclose(ridge_probe(z, y, 0.1), reference.ridge_probe(z, y, 0.1), rtol=1e-9)


def test_the_embedded_task_can_be_immunized_with_every_option_at_once(run):
    benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
    made, record = dataclasses.replace(DEFENSES["sophon-lasting"], tasks=2, precision="bf16").immunize(
        trained_on(benign), benign, restricted, run=run
    )
    assert record.completed
    assert made.dtype == torch.float32
