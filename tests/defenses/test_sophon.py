"""What SOPHON has here beyond the paper: a wider Phi, lives, probes, distillation, exact gradients, validation."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from functools import cache
from typing import ClassVar

import pytest
import torch
from test_defenses import Interrupted, Killed
from torch import nn

import reference
from cases import DEFENSES
from conftest import toy_task
from holdfast.adversaries import FineTuning
from holdfast.adversaries.batteries import BATTERIES
from holdfast.defenses import Sophon, state, trainer, validation
from holdfast.defenses.guard import BenignGuard
from holdfast.defenses.sophon import sophon
from holdfast.defenses.sophon.exact import MOMENTUM, ExactSimulation
from holdfast.defenses.sophon.population import Population
from holdfast.defenses.sophon.simulation import Simulation
from holdfast.defenses.validation import VALIDATION, validation_score
from holdfast.errors import HoldfastError
from holdfast.losses import Objective, distillation_loss, inverse_cross_entropy, ridge_probe
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import load_task
from holdfast.training import Strategy, pretrain

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
            ({"scopes": ("lora",)}, "the immunized model has none"),
            ({"strategies": (Strategy(scope="lora"),)}, "the immunized model has none"),
            ({"strategies": ()}, "strategies is empty"),
            ({"scopes": ()}, "scopes is empty"),
            ({"tasks": 3, "population": 2, "lifetime": 2}, "population is 2; expected at least tasks, which is 3"),
            ({"lifetime": 0}, "lifetime is 0"),
            ({"probe_weight": -1.0}, "probe_weight is -1.0"),
            ({"distillation": math.nan}, "distillation is nan"),
            ({"loss": "none"}, "nothing is suppressed"),
            ({"precision": "fp8"}, "precision"),
            ({"second_order": True}, "exact meta-gradient is for adversaries"),
            ({"second_order": True, "optimizers": ("sgd",), "lifetime": 2}, "cannot be combined with lifetime"),
            ({"validate_every": 0}, "validate_every is 0"),
            ({"validation_steps": 1}, "validation_steps is 1"),
            ({"probe_batch": 1}, "probe_batch is 1; expected at least 2"),
            ({"population": 2}, "no adversary is continued"),
            ({"recovery_loops": 5, "guard": False}, "recovery_loops need the guard"),
            ({"steps": 2, "gamma": (0.0, 0.0)}, "one above 0"),
            ({"steps": 2, "gamma": (1.0, -1.0)}, "at least 0"),
            ({"second_order": True, "strategies": (Strategy(optimizer="sgd", gradient="sign"),)}, "raw gradient"),
            ({"second_order": True, "strategies": (Strategy(optimizer="sgd", precision="bf16"),)}, "in float32"),
            ({"steps": 5, "evaluate_every": 2}, "expected a divisor of the 5 steps"),
            ({"steps": 2, "evaluate_every": 2, "gamma": (1.0, 1.0)}, "without gamma"),
            ({"head_gradient": True, "lifetime": 2}, "head_gradient works only with a lifetime of one loop"),
        ],
    )
    def test_refuses_what_cannot_work(self, settings, match):
        with pytest.raises(HoldfastError, match=match):
            Sophon(**settings)


class TestSimulation:
    @pytest.mark.parametrize(
        ("start", "moved"),
        [("direct", [0, 2, 4]), ("head", [0, 2]), ("last-block", [0]), ("last-half", [0]), ("shrink-perturb", [0, 2])],
    )
    def test_what_starts_anew_gets_no_gradient(self, small, task, start, moved):
        simulation = Simulation(small, inverse_cross_entropy)
        simulation.run(task, Strategy(start, batch_size=10), 2, None, generator=stream())
        names = [n for n, _ in small.network.named_parameters()]
        reached = {int(n.split(".")[0]) for n, g in zip(names, simulation.gradients(), strict=True) if g is not None}
        assert sorted(reached) == moved

    def test_of_a_weight_that_was_halved_the_gradient_counts_by_half(self, small, task):
        simulation = Simulation(small, inverse_cross_entropy)
        torch.manual_seed(0)
        adversary = simulation.start(Strategy("shrink-perturb", batch_size=EVERYTHING), task)
        assert list(adversary.shared.values()) == [0.5, 1.0, 0.5, 1.0]
        batch = next(task.batches("train", EVERYTHING, generator=stream(), device=CPU))
        loss = inverse_cross_entropy(adversary.model(batch.x), batch.y)
        plain = torch.autograd.grad(loss, list(adversary.model.parameters())[:4])
        again = inverse_cross_entropy(adversary.model(batch.x), batch.y)
        simulation._add(adversary, again, 1.0)
        expected = [g if g.dim() == 1 else g / 2 for g in plain]
        assert close(simulation.gradient[:4], expected)

    def test_as_in_the_published_code_the_gradient_at_a_fresh_head_moves_the_released_one(self, small, task):
        def gradients(**how):
            torch.manual_seed(1)
            simulation = Simulation(small, inverse_cross_entropy, **how)
            simulation.run(task, Strategy("head", batch_size=10), 2, None, generator=stream())
            return simulation.gradients()

        plain, published = gradients(), gradients(head_gradient=True)
        assert close(plain[:4], published[:4])
        assert plain[4:] == [None, None]
        assert [g.shape for g in published[4:]] == [p.shape for p in small.head.parameters()]

    def test_a_gradient_at_a_head_of_another_width_moves_no_released_one(self, model, benign, run):
        with pytest.raises(HoldfastError, match="a head of 3 outputs to one of 5"):
            Sophon(head_gradient=True).immunize(model, benign, load_task("digits[7-9]"), run=run)

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

    def test_evaluated_every_second_step_it_is_the_sum_over_these_with_twice_the_weight(self, small, task):
        weights = Sophon(steps=4, evaluate_every=2).step_weights
        assert weights == (0.0, 2.0, 0.0, 2.0)
        calls = []

        def counted(logits, labels):
            calls.append(len(labels))
            return inverse_cross_entropy(logits, labels)

        simulation, strategy = Simulation(small, counted), Strategy("direct", "all", "sgd", 1e-14, EVERYTHING)
        seen = simulation.run(task, strategy, 4, weights, generator=stream())
        assert len(calls) == 2
        once = Simulation(small, inverse_cross_entropy)
        outcome = once.run(task, strategy, 1, None, generator=stream())  # at a rate of about 0 all steps are the same
        expected = [4 * g for g in once.gradient]
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(simulation.gradient, expected, strict=True))
        assert seen.loss == pytest.approx(outcome.loss, rel=1e-6)

    def test_the_probe_is_the_mean_over_depths(self, small, task):
        def gradient(depth):
            simulation = Simulation(small, Objective(None, 1.0, 0.1, EVERYTHING, depth))
            simulation.run(task, Strategy("direct", "all", "sgd", 1e-14, 10), 1, None, generator=stream())
            return simulation.gradient

        x, y = (torch.as_tensor(v["train"]) for v in (task._x, task._y))
        hidden, last = small.network[:2](x), small.features(x)
        shares = [reference.ridge_probe(z, y, 0.1) for z in (hidden, last)]
        expected = torch.autograd.grad(sum(shares) / 2, list(small.parameters()), allow_unused=True)
        for own, wanted in zip(gradient(2), expected, strict=True):
            assert torch.allclose(own, torch.zeros_like(own) if wanted is None else wanted, rtol=1e-6, atol=1e-9)
        assert not close(gradient(2), gradient(1))

    def test_a_probe_deeper_than_the_body_is_refused(self, model, benign, restricted, run):
        with pytest.raises(HoldfastError, match="the depth of a probe is 9; expected 1 to"):
            Sophon(probe_weight=1.0, probe_depth=9).immunize(model, benign, restricted, run=run)

    def test_the_probe_reaches_what_the_adversary_freezes(self, small, task):
        def gradient(scope):
            simulation = Simulation(small, Objective(None, 1.0, 0.1, EVERYTHING))
            simulation.run(task, Strategy("direct", scope, "sgd", 1e-14, 10), 1, None, generator=stream())
            return simulation.gradient

        assert any(float(g.abs().max()) > 1e-6 for g in gradient("head"))
        assert close(gradient("head"), gradient("all"))

    def test_the_probe_is_fitted_on_the_samples_of_the_evaluation(self, small, task):
        other = toy_task(3, seed=5)
        other._x = {s: v.double() for s, v in other._x.items()}

        def gradient(learned, evaluation):
            simulation = Simulation(small, Objective(None, 1.0, 0.1, EVERYTHING))
            simulation.run(learned, Strategy("direct", "all", "sgd", 1e-14, 10), 1, None, generator=stream(),
                           evaluation=evaluation)  # fmt: skip
            return simulation.gradient

        assert close(gradient(task, other), gradient(other, None))
        assert not close(gradient(task, other), gradient(task, None))

    def test_a_probe_batch_of_one_class_tells_nothing(self, small, task):
        simulation = Simulation(small, Objective(None, 1.0, 0.1, 2))
        for seed in range(8):  # some of these pairs are of one class
            simulation.run(task, Strategy("direct", batch_size=10), 1, None, generator=stream(seed))
        assert all(g.isfinite().all() for g in simulation.gradient)

    @pytest.mark.parametrize("start", ["direct", "head"])
    def test_a_weight_that_head_and_body_share_has_the_gradient_of_its_use_in_the_body(self, task, start):
        """A head that starts anew is not the body's weight any more, which the meta-gradient still reaches."""
        torch.manual_seed(0)
        layers = nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)
        layers[4].weight = layers[2].weight
        small = SplitModel(nn.Sequential(*layers).double(), "4")
        simulation = Simulation(small, inverse_cross_entropy)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            simulation.run(task, Strategy(start, "all", "sgd", 1e-9, 20), 1, None, generator=stream())
        shared = [n for n, _ in small.named_parameters()].index("network.2.weight")
        own = simulation.gradients()[shared]
        plain = small.clone().train()
        if start == "head":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                plain.reset_head(task.num_outputs)
        generator = stream()
        batches = [task.batches("train", 20, generator=generator, device=torch.device("cpu")) for _ in range(2)]
        _, evaluated = (next(b) for b in batches)  # the simulation draws in this order
        loss = inverse_cross_entropy(plain(evaluated.x), evaluated.y)
        expected = torch.autograd.grad(loss, plain.network[2].weight)[0]
        assert expected.abs().max() > 1e-4
        assert torch.allclose(own, expected, atol=1e-6)

    def test_bf16_trains_as_float32_does(self, restricted):
        """Autocast must not go on with the weights of the first step."""
        torch.manual_seed(0)
        model = load_model("cnn", restricted)

        def accuracy(bf16):
            simulation = Simulation(model, inverse_cross_entropy, bf16=bf16)
            strategy = Strategy("head", "all", "adam", 1e-2, 60)
            return simulation.run(restricted, strategy, 30, None, generator=stream()).score

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
    @pytest.mark.parametrize("decay", [0.0, 0.2])
    @pytest.mark.parametrize("optimizer", MOMENTUM)
    def test_is_the_derivative_of_equation_4(self, small, task, optimizer, decay):
        """Central differences of the whole objective: fine-tuning by hand from a shifted theta."""
        gamma, rate = [0.5, 1.0, 2.0], 0.3
        simulation = ExactSimulation(small, inverse_cross_entropy)
        strategy = Strategy("direct", "all", optimizer, rate, EVERYTHING, decay)
        simulation.run(task, strategy, len(gamma), tuple(gamma), generator=stream())

        x, y = task._x["train"], task._y["train"]
        names = [n for n, _ in small.named_parameters()]

        def logits(parameters):
            return torch.func.functional_call(small, dict(zip(names, parameters, strict=True)), x)

        def objective(theta):
            return float(
                reference.meta_objective(
                    lambda p, _: nn.functional.cross_entropy(logits(p), y), lambda p, _: reference.ice(logits(p), y),
                    theta, gamma, rate, MOMENTUM[optimizer], optimizer == "nesterov", decay,
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

    def test_parameters_that_are_not_used_are_left_out(self, task):
        class Idle(nn.Module):
            def __init__(self):
                super().__init__()
                self.idle, self.head = nn.Linear(2, 2).double(), nn.Linear(6, 3).double()

            def forward(self, x):
                return self.head(x)

        simulation = ExactSimulation(SplitModel(Idle(), "head"), inverse_cross_entropy)
        simulation.run(task, Strategy("direct", "all", "sgd", 0.1, 10), 2, None, generator=stream())
        assert [g is not None for g in simulation.gradients()] == [False, False, True, True]

    def test_goes_through_attention(self, restricted):
        model = load_model("timm:vit_tiny_patch16_224", load_task("digits[5-9]@image_size=32,channels=3"))
        task = load_task("digits[5-9]@image_size=32,channels=3")
        simulation = ExactSimulation(model, inverse_cross_entropy)
        simulation.run(task, Strategy("direct", "all", "sgd", 0.01, 4), 1, None, generator=stream())
        assert all(g.isfinite().all() for g in simulation.gradient)

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
        population.adversaries.clear()
        population._unused_slots.clear()  # the first life is as long as the others
        for _ in range(3):
            population.simulate(task, 1, 4, None, generator=stream())
        lasting = population.adversaries[0]
        population.simulations[0]._move(lasting, 1.0)

        torch.manual_seed(1)
        once = Simulation(small, inverse_cross_entropy)
        adversary = once.start(strategy, task)
        once._simulate(adversary, task, 12, None, stream(), task)
        assert lasting.loops_done == 3
        assert close(lasting.model.parameters(), adversary.model.parameters())

    def test_at_rest_it_moves_with_the_model_but_for_what_it_started_anew(self, small, task):
        population = self.population(small, Strategy("head", "all", "adam", 1e-2, 20), size=2, lifetime=8)
        population.next_slot = 1  # the second one has a first life of several loops
        population.simulate(task, 1, 2, None, generator=stream())
        adversary = population.adversaries[1]
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
            population.simulate(task, 1, 1, None, generator=stream())
            lives.append({slot: (a.loops_done, a.max_loops) for slot, a in population.adversaries.items()})
        assert [lives[i].get(i, (1, 1))[1] for i in range(4)] == [1, 3, 5, 7]
        assert {life for later in lives[32:] for _, life in later.values()} == {8}
        assert len({loops for loops, _ in lives[-1].values()}) > 1

    @pytest.mark.parametrize("start", ["direct", "head"])
    def test_two_devices_collect_what_one_does(self, small, task, start):
        def gradients(devices):
            torch.manual_seed(0)
            population = self.population(small, Strategy(start, batch_size=20), size=5, lifetime=3, devices=devices)
            for _ in range(3):
                seen = population.simulate(task, 3, 2, None, generator=stream(4))
            return population.simulations[0].gradient, seen

        (one, seen), (two, seen_by_two) = gradients(()), gradients((CPU, CPU))
        assert close(one, two)
        assert [s.loss for s in seen] == pytest.approx([s.loss for s in seen_by_two])

    def test_adversaries_of_one_loop_have_different_heads(self, small, task):
        population = self.population(small, Strategy("head", batch_size=20), size=3, lifetime=9)
        population._unused_slots.clear()
        population.simulate(task, 3, 1, None, generator=stream())
        heads = [population.adversaries[slot].model.head.weight for slot in range(3)]
        assert not torch.allclose(heads[0], heads[1], atol=0.05)
        assert not torch.allclose(heads[1], heads[2], atol=0.05)

    def test_what_an_adversary_freezes_has_the_statistics_of_the_present_model(self, model, restricted):
        population = self.population(model, Strategy("head", "head", "adam", 1e-2, 20), lifetime=9)
        population._unused_slots.clear()
        population.simulate(restricted, 1, 1, None, generator=stream())
        model.train()
        x = next(restricted.sweep("train", 50, device=CPU)).x
        with torch.no_grad():
            for _ in range(20):
                model(3 * x)
        model.eval()
        population.simulate(restricted, 1, 1, None, generator=stream())
        lasting = population.adversaries[0]
        population.simulations[0]._move(lasting, 1.0)
        lasting.model.eval()
        assert torch.allclose(lasting.model.features(x), model.features(x), rtol=1e-4, atol=1e-5)

    def test_restored_it_goes_on_as_if_nothing_had_happened(self, small, task):
        phi = [Strategy(start, "all", optimizer, 1e-2, 20) for start in ("direct", "head", "last-block")
               for optimizer in ("adam", "momentum")]  # fmt: skip

        def new():
            return Population(small, Objective(inverse_cross_entropy), phi, size=3, lifetime=5)

        torch.manual_seed(0)
        whole = new()
        for i in range(4):
            whole.simulate(task, 2, 2, None, generator=stream(i))
        tensors, values = whole.saved()
        tensors = {n: v.clone() for n, v in tensors.items()}
        again = new()
        again.restore(task, tensors, json.loads(json.dumps(values)))
        for i in range(4, 12):  # past the ends of all lives
            torch.manual_seed(i)
            seen = whole.simulate(task, 2, 2, None, generator=stream(i))
            torch.manual_seed(i)
            assert again.simulate(task, 2, 2, None, generator=stream(i)) == seen
            assert all(
                (a is None and b is None) or torch.equal(a, b)
                for a, b in zip(whole.gradients(), again.gradients(), strict=True)
            )

    def test_the_guard_ends_all_lives_when_it_goes_back(self, model, benign, restricted, run, monkeypatch):
        cleared = []
        monkeypatch.setattr(Population, "clear", lambda self, old=Population.clear: (cleared.append(1), old(self))[1])
        violent = Sophon(iterations=3, steps=2, suppression_lr=0.5, guard_every=1, batch_sizes=(20,), clip=None,
                         lifetime=5, max_benign_drop=0.0, reinforcement_lr=1e-6)  # fmt: skip
        _, record = violent.immunize(trained_on(benign), benign, restricted, run=run)
        assert len(cleared) == 1 + sum("back to the last good state" in e.message for e in record.events) > 1


@cache
def trained_on(task):
    """A model that knows a task a little; it is shared, so do not change it."""
    with torch.random.fork_rng():
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
        assert any("recovered to" in e.message for e in record.events)
        assert not any("halved" in e.message for e in record.events)
        assert max(record.history["gradient_passes"]) == 2 * 2 + 1 + 60

    def test_what_it_does_not_bring_back_goes_back(self, benign, restricted, run):
        _, record = self.made(benign, restricted, run, recovery_loops=1, reinforcement_lr=1e-9)
        assert any("halved" in e.message for e in record.events)

    def test_the_recovered_state_is_a_good_one(self, benign, restricted, run):
        settings = Sophon(recovery_loops=1, max_benign_drop=1.0)
        going = sophon._Immunization(settings, trained_on(benign), benign, restricted, run)
        for name in ("benign_score", "gradient_passes"):
            going.record.history[name].append(None)
        with torch.no_grad():
            going.model.head.weight.mul_(0.5)
        going.too_low("for a test")
        assert all(torch.equal(v, going.guard.good[n]) for n, v in going.model.network.state_dict().items())


class TestJointStep:
    def test_is_one_step_of_adam_with_both_gradients(self, benign, restricted, run):
        settings = Sophon(
            loss="ice",
            steps=2,
            batch_sizes=(20,),
            joint_weight=0.3,
            reinforcement_lr=1e-2,
            clip=None,
            initialisations=("direct",),
        )
        going = sophon._Immunization(settings, trained_on(benign), benign, restricted, run)
        plain = going.model.clone().train()
        going.one_round(stream())
        # The meta-gradient does not depend on the weight of the step that follows: taken again, with the same draws.
        again = sophon._Immunization(settings, trained_on(benign), benign, restricted, run)
        generator = stream()
        again._suppress(generator, again.learned, again.evaluated)
        batch = next(again.benign.batches("train", settings.reinforcement_batch, generator=generator, device=CPU))
        gradients = torch.autograd.grad(again.benign.loss(plain, batch), list(plain.parameters()))
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
        for parameter, own, meta in zip(plain.parameters(), gradients, again.population.gradients(), strict=True):
            parameter.grad = own if meta is None else own + 0.3 * meta
        optimizer.step()
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            for a, b in zip(plain.parameters(), going.model.parameters(), strict=True)
        )

    def test_the_guard_halves_its_weight(self, benign, restricted, run):
        harsh = Sophon(iterations=2, steps=2, batch_sizes=(20,), joint_weight=1e6, reinforcement_lr=0.1, guard_every=1,
                       clip=None, max_benign_drop=0.05)  # fmt: skip
        _, record = harsh.immunize(trained_on(benign), benign, restricted, run=run)
        assert any("joint_weight halved to 5e+05" in event.message for event in record.events)

    @pytest.mark.parametrize("loops", [{"suppression_loops": 2}, {"reinforcement_loops": 0}])
    def test_needs_a_step_to_join(self, loops):
        with pytest.raises(HoldfastError, match="one suppression loop and at least one reinforcement loop"):
            Sophon(joint_weight=0.1, **loops)


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

    def test_it_is_the_best_attack_over_two_budgets_whatever_diverges(self, model, restricted, run, monkeypatch):
        scores = iter([0.3, 0.9, math.nan, 0.2, 0.5, math.nan])
        monkeypatch.setattr(type(restricted), "audit_score", lambda *_: next(scores))
        assert validation_score(model, restricted, 4, run=run) == pytest.approx((0.5 + 0.9) / 2)

    def test_a_state_under_the_floor_is_not_examined(self, model, benign, restricted, run, monkeypatch):
        scores, examined = iter([0.9, 0.9, 0.1, 0.9]), iter([0.5, 0.4])  # the first one is the original's
        monkeypatch.setattr(type(benign), "score", lambda *_: next(scores))
        monkeypatch.setattr(validation, "validation_score", lambda *_, **__: next(examined))
        settings = Sophon(iterations=3, steps=1, validate_every=1)
        _, record = settings.immunize(model, benign, restricted, run=run)
        assert record.history["validation_score"] == [0.5, None, 0.4]

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

        monkeypatch.setattr(validation, "validation_score", scored)
        settings = Sophon(iterations=3, steps=1, validate_every=1, max_benign_drop=1.0)
        made, record = settings.immunize(model, benign, restricted, run=run)
        assert len(set(states)) == 3
        assert made.facts().sha256 == states[1]
        assert record.history["validation_score"] == [0.5, 0.2, 0.4]
        assert "kept the state after round 2" in record.events[-1].message

    def test_nothing_of_the_examined_samples_is_trained_on(self, model, benign, restricted, run, monkeypatch):
        seen = []
        monkeypatch.setattr(validation, "validation_score", lambda model, task, *_, **__: seen.append(task) or 0.5)
        learned, simulate = [], Simulation._simulate
        monkeypatch.setattr(
            Simulation,
            "_simulate",
            lambda self, adversary, *rest: learned.append(rest) or simulate(self, adversary, *rest),
        )
        Sophon(iterations=1, steps=1, validate_every=1, max_benign_drop=1.0).immunize(
            model, benign, restricted, run=run
        )
        simulated = {x.numpy().tobytes() for task in (learned[0][0], learned[0][4]) for x in task._x["train"]}
        assert not simulated & {x.numpy().tobytes() for x in seen[0]._x["test"]}
        train, test = ({bytes(x.numpy().tobytes()) for x in seen[0]._x[s]} for s in ("train", "test"))
        everything = {bytes(x.numpy().tobytes()) for x in restricted._x["train"]}
        assert not train & test
        assert train | test <= everything
        assert len(test) == pytest.approx(validation.VALIDATION_SHARE * len(everything), rel=0.1)


class TestAscentOfADenoiser:
    """The unstable baseline may end in numbers that are none; that is a result."""

    SETTINGS: ClassVar = {"loss": "mse-ascent", "iterations": 20, "steps": 1, "suppression_lr": 10.0, "clip": 1e9,
                          "batch_sizes": (10,), "reinforcement_batch": 10, "guard_every": 5}  # fmt: skip

    def test_without_the_guard_it_stops_there_and_says_so(self, denoiser, digit_images, run):
        settings = Sophon(guard=False, **self.SETTINGS)
        made, record = settings.immunize(denoiser, *digit_images, run=run)
        assert not record.completed
        assert "not finite; the guard is off" in record.events[-1].message
        assert record.history["iteration"][-1] < 20
        assert None in (record.history["reinforcement_loss"][-1], record.history["suppression_loss"][-1])
        assert math.isnan(digit_images[0].score(made))
        json.dumps(settings.result(record).model_dump(mode="json"), allow_nan=False)

    def test_with_the_guard_the_error_has_a_ceiling(self, denoiser, digit_images, run):
        settings = Sophon(max_rollbacks=2, **{**self.SETTINGS, "guard_every": 1})
        made, record = settings.immunize(denoiser, *digit_images, run=run)
        assert not record.completed
        assert record.rollbacks == 2
        assert "is over the ceiling" in record.events[0].message or "not finite" in record.events[0].message
        assert digit_images[0].score(made) < 1.2 * digit_images[0].score(denoiser)


class TestKinds:
    def test_auto_is_the_loss_of_the_kind(self, benign, digit_images):
        assert Sophon().resolved(benign).loss == "ice"
        assert Sophon().resolved(digit_images[0]).loss == "dos"
        assert Sophon(loss="klu").resolved(benign).loss == "klu"
        assert Sophon(loss="none", probe_weight=1.0).resolved(benign).loss == "none"

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"loss": "ice"}, "set loss to dos or mse-ascent"),
            ({"probe_weight": 0.5, "probe_depth": 2}, "the depth of a probe is 2; expected 1 for a denoiser"),
        ],
    )
    def test_what_a_denoiser_cannot_take_is_refused(self, denoiser, digit_images, run, settings, words):
        with pytest.raises(HoldfastError, match=words):
            Sophon(**settings).immunize(denoiser, *digit_images, run=run)

    def test_kinds_are_not_mixed(self, model, denoiser, benign, restricted, digit_images, run):
        with pytest.raises(HoldfastError, match="the same for both"):
            Sophon().immunize(denoiser, digit_images[0], restricted, run=run)
        with pytest.raises(HoldfastError, match="set loss to ice or klu or released or ce-ascent"):
            Sophon(loss="dos").immunize(model, benign, restricted, run=run)


@pytest.fixture(scope="module")
def narrow():
    """A narrow denoiser that knows nothing, and few images of two tasks."""
    limits = "kind=denoising,train_limit=100,test_limit=30"
    tasks = [load_task(f"digits{part}@{limits}") for part in ("[0-4]", "[5-9]")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_model(ModelSpec(name="unet", options={"widths": [8], "attention": 1}), tasks[0]).eval(), tasks


class TestAveraging:
    """An average of the weights is looked at, examined and released; what is trained is not it."""

    SETTINGS: ClassVar = {"steps": 1, "batch_sizes": (20,), "reinforcement_batch": 20}

    def made(self, model, tasks, run=None, **more):
        settings = Sophon(**{"iterations": 4, "max_benign_drop": 1.0, **self.SETTINGS, **more})
        return settings.immunize(model, *tasks, run=run or Run(0, CPU))

    def test_it_is_that_of_all_rounds_and_training_does_not_see_it(self, narrow):
        denoiser, _ = narrow
        states = [denoiser, *(self.made(*narrow, iterations=n)[0] for n in (1, 2, 3))]
        expected = {n: v.clone() for n, v in denoiser.network.state_dict().items()}
        for later in states[1:]:
            for name, value in later.network.state_dict().items():
                expected[name] = 0.7 * expected[name] + 0.3 * value
        found, _ = self.made(*narrow, iterations=3, ema=0.7)
        for name, value in found.network.state_dict().items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("guard", [True, False])
    def test_looking_changes_nothing_unless_the_guard_acts(self, narrow, guard, monkeypatch):
        if not guard:
            monkeypatch.setattr(BenignGuard, "limit", 0.0)  # no state is a good one, and that is allowed
        (seldom, once), (often, record) = (
            self.made(*narrow, ema=0.7, guard=guard, guard_every=every) for every in (4, 1)
        )
        assert None not in record.history["benign_score"]
        assert record.history["suppression_loss"] == once.history["suppression_loss"]
        assert often.facts().sha256 == seldom.facts().sha256

    def test_what_was_examined_is_what_is_released(self, narrow, monkeypatch):
        examined = []
        monkeypatch.setattr(
            validation,
            "validation_score",
            lambda model, *_, **__: examined.append(model.facts().sha256) or -len(examined),
        )
        found, _ = self.made(*narrow, ema=0.7, validate_every=2)
        assert len(set(examined)) == 2
        assert found.facts().sha256 == examined[-1]

    @pytest.mark.parametrize("recovery", [0, 3])
    def test_after_a_bad_look_average_and_model_are_one(self, narrow, recovery, monkeypatch):
        settings = Sophon(iterations=1, ema=0.7, recovery_loops=recovery, **self.SETTINGS)
        denoiser, tasks = narrow
        going = sophon._Immunization(settings, denoiser, *tasks, Run(0, CPU))
        scores = iter([1e9, 0.0])
        monkeypatch.setattr(type(tasks[0]), "score", lambda *_: next(scores))
        made, record = going.finish()
        assert ("recovered to" if recovery else "halved") in record.events[0].message
        assert all(torch.equal(v, going.average.state[n]) for n, v in made.network.state_dict().items())
        same = made.facts().sha256 == denoiser.facts().sha256
        assert same is not bool(recovery)

    @pytest.mark.parametrize(
        ("more", "stops"),
        [
            ({}, (2, 3, 4)),
            ({"validate_every": 2, "validation_steps": 2}, (3,)),
            ({"max_benign_drop": 0.0}, (3, 4)),
        ],
    )
    def test_stops_anywhere_and_continues_to_the_same(self, trained, benign, restricted, tmp_path, more, stops):
        settings = {"iterations": 5, "ema": 0.7, "guard_every": 2, "suppression_lr": 1e-2, **more}
        whole, record = self.made(trained, (benign, restricted), **settings)
        for after in stops:
            folder = tmp_path / str(after)

            class Stops(Run):
                def seeded(self, *purpose, last=after):
                    if purpose[:2] == ("sophon", last):
                        raise Killed
                    return super().seeded(*purpose)

            with pytest.raises(Killed):
                self.made(trained, (benign, restricted), Stops(0, CPU, folder), **settings)
            resumed, again = self.made(trained, (benign, restricted), Run(0, CPU, folder), **settings)
            assert resumed.facts().sha256 == whole.facts().sha256
            assert again.history == record.history
            assert again.events == record.events

    @pytest.mark.parametrize("decay", [0.0, 1.0, float("nan")])
    def test_a_decay_is_between_0_and_1(self, decay):
        with pytest.raises(HoldfastError, match="expected a decay between 0 and 1"):
            Sophon(ema=decay)


class TestNothingAchieved:
    def test_a_model_that_is_as_it_was_is_not_called_complete(self, model, benign, restricted, run, monkeypatch):
        monkeypatch.setattr(BenignGuard, "limit", 2.0)
        made, record = Sophon(iterations=3, steps=1, guard_every=1).immunize(model, benign, restricted, run=run)
        assert made.facts().sha256 == model.facts().sha256
        assert not record.completed
        assert "the model is unchanged" in record.events[-1].message

    def test_nor_is_a_state_that_was_not_examined(self, model, benign, restricted, run, monkeypatch):
        monkeypatch.setattr(BenignGuard, "limit", 2.0)
        settings = Sophon(iterations=2, steps=1, guard=False, validate_every=1)
        _, record = settings.immunize(model, benign, restricted, run=run)
        assert not record.completed
        assert "none was chosen" in record.events[-1].message


class TestCheckpoints:
    def stop(self, model, benign, restricted, tmp_path):
        settings = Sophon(iterations=4, steps=1, guard_every=1, max_benign_drop=1.0, population=2, lifetime=3)
        with pytest.raises(Killed):
            settings.immunize(model, benign, restricted, run=Interrupted(0, CPU, tmp_path))
        return settings

    def test_a_state_belongs_to_what_was_trained(self, model, benign, restricted, tmp_path):
        settings = self.stop(model, benign, restricted, tmp_path)
        frozen = model.clone()
        next(frozen.parameters()).requires_grad_(False)
        with pytest.raises(HoldfastError, match="another immunization"):
            settings.immunize(frozen, benign, restricted, run=Run(0, CPU, tmp_path))

    def test_a_state_belongs_to_how_inputs_are_normalised(self, model, benign, restricted, tmp_path):
        settings = self.stop(model, benign, restricted, tmp_path)
        other = SplitModel(model.clone().network, model.head_name, mean=(0.9,), std=(0.1,))
        with pytest.raises(HoldfastError, match="another immunization"):
            settings.immunize(other, benign, restricted, run=Run(0, CPU, tmp_path))

    def test_a_state_of_another_version_is_refused(self, model, benign, restricted, tmp_path, monkeypatch):
        settings = self.stop(model, benign, restricted, tmp_path)
        monkeypatch.setattr(state, "FORMAT", 99)
        with pytest.raises(HoldfastError, match="another version of Holdfast"):
            settings.immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))

    def test_resuming_leaves_the_global_generator(self, model, benign, restricted, tmp_path):
        settings = self.stop(model, benign, restricted, tmp_path)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        settings.immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_state_is_saved_between_looks_when_time_has_passed(
        self, model, benign, restricted, tmp_path, monkeypatch
    ):
        saves = []
        monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(state, "save_tensors", lambda path, tensors, meta: saves.append(meta["round"]))
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


def test_a_model_in_float64_is_not_for_bf16(task, small, run):
    with pytest.raises(HoldfastError, match="computes in float64"):
        Sophon(precision="bf16").immunize(small, task, task, run=run)


def test_bf16_is_for_reinforcement_too(model, benign, restricted, run, monkeypatch):
    seen, forward = set(), SplitModel.forward

    def spied(self, x):
        logits = forward(self, x)
        seen.add((self.num_outputs, logits.dtype))
        return logits

    monkeypatch.setattr(SplitModel, "forward", spied)
    narrow = load_task("digits[5-7]")  # simulated adversaries have three outputs
    settings = Sophon(iterations=1, steps=1, initialisations=("head",), precision="bf16", guard=False, guard_every=9)
    settings.immunize(model, benign, narrow, run=run)
    assert {(3, torch.bfloat16), (5, torch.bfloat16)} <= seen


def test_options_go_together(benign, restricted, run):
    made, record = dataclasses.replace(DEFENSES["sophon-lasting"], tasks=2, precision="bf16").immunize(
        trained_on(benign), benign, restricted, run=run
    )
    assert record.completed
    assert made.dtype == torch.float32
