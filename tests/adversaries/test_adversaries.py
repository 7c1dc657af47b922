from __future__ import annotations

import copy
import json
from itertools import islice
from typing import get_args

import pytest
import torch
from torch import nn

from cases import ADVERSARIES
from holdfast.adversaries import BATTERIES, SEARCHES, UNDO, Adversary, FineTuning, Probe, battery, build
from holdfast.adversaries.benign_data import BenignTraining
from holdfast.adversaries.probes import prepare
from holdfast.adversaries.search_space import MOVES
from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, features, load_model
from holdfast.runtime.run import fingerprint
from holdfast.spectral.convergence import descend
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import RegressionTask, load_task
from holdfast.training import OPTIMIZERS, Initialisation, Scope, Strategy, finetune, pretrain
from holdfast.training import prepare as start

CPU = torch.device("cpu")


def enough_steps(name):
    """Those that train a head alone, or first something else, need more to learn; a step of Newton takes its time."""
    if isinstance(ADVERSARIES[name], Probe):
        return 6 if "newton" in name else 30
    return 60 if name.startswith("head-head") or name in ("burn-in", "distil-first") else 16


@pytest.mark.parametrize("name", ADVERSARIES)
class TestEveryAdversary:
    def test_learns_on_a_copy(self, name, trained, benign, restricted, run):
        digest = trained.facts().sha256
        budgets = [0, 1, enough_steps(name)]
        curve = ADVERSARIES[name].attack(trained, restricted, budgets=budgets, run=run, benign=benign)
        assert trained.facts().sha256 == digest
        assert curve.budgets == budgets
        assert curve.finite
        assert curve.scores[-1] > curve.scores[0] + 0.1
        assert curve.losses[0] is None
        solved_at_once = isinstance(ADVERSARIES[name], Probe)  # in closed form, or by a step on whitened features
        assert curve.losses[2] < curve.losses[1] or (solved_at_once and curve.losses[2] < curve.losses[1] + 1e-9)

    def test_depends_on_the_seed_and_on_nothing_else(self, name, model, benign, run):
        task = benign.limit_test(40, 0)

        def curve(seed, role):
            settings = {"run": run, "seed": seed, "role": role, "benign": benign}
            return ADVERSARIES[name].attack(model, task, budgets=[0, 2], **settings)

        torch.manual_seed(1)
        first = curve(0, "immunized")
        torch.manual_seed(2)
        again = curve(0, "original")
        assert (first.scores, first.losses) == (again.scores, again.losses)
        takes_all_samples = isinstance(ADVERSARIES[name], Probe)  # and starts from zero: nothing is drawn
        assert (curve(1, "immunized").losses != first.losses) or takes_all_samples

    def test_config_is_plain_and_names_its_kind(self, name):
        config = ADVERSARIES[name].config()
        assert json.loads(json.dumps(config)) == config
        assert config["kind"]

    def test_can_be_built_from_its_config(self, name):
        config = ADVERSARIES[name].config()
        assert build(json.loads(json.dumps(config))).config() == config
        assert build(config).name == ADVERSARIES[name].name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "Unknown kind of adversary"),
        ({"kind": "fine-tuning"}, "did you mean 'finetuning'"),
        ({"kind": "finetuning", "optimiser": "adam"}, "did you mean 'optimizer'"),
        ({"kind": "finetuning", "undo": ["reviv"]}, "did you mean 'revive'"),
        ({"kind": "finetuning", "burn_in": -1}, "burn_in is -1"),
        ({"kind": "finetuning", "replay": float("nan")}, "replay is nan"),
        ({"kind": "finetuning", "anchor": -1.0}, "anchor is -1.0"),
        ({"kind": "finetuning", "benign_first": -1}, "benign_first is -1"),
        ({"kind": "finetuning", "anchor": 1.0, "scope": "head"}, "anchor trains the body, and scope 'head' leaves it"),
        ({"kind": "finetuning", "benign_first": 3, "scope": "head"}, "benign_first trains the body"),
        ({"kind": "finetuning", "schedule": "cosine"}, "schedule_steps is 0"),
        (
            {"kind": "finetuning", "schedule": "restarts", "schedule_steps": 3, "warmup": 3},
            "more steps than its warm-up",
        ),
        ({"kind": "finetuning", "sharpness": -0.1}, "sharpness is -0.1"),
        ({"kind": "finetuning", "benign_floor": 1.5}, "benign_floor is 1.5"),
        ({"kind": "finetuning", "benign_floor": 0.9, "scope": "head"}, "benign_floor trains the body"),
        ({"kind": "finetuning", "distil_first": -2}, "distil_first is -2"),
        ({"kind": "finetuning", "augment": "mixup"}, "augment is 'mixup'; expected settings of timm's RandAugment"),
        ({"kind": "unlabelled", "share": 0}, "share is 0"),
        ({"kind": "unlabelled", "pseudo": -1.0}, "pseudo is -1.0"),
        ({"kind": "unlabelled", "threshold": 2.0}, "threshold is 2.0"),
        ({"kind": "unlabelled", "shares": 0.1}, "did you mean 'share'"),
        ({"kind": "probe", "steps": 3}, "Unknown setting of Probe"),
    ],
)
def test_refuses_to_build(config, message):
    with pytest.raises(HoldfastError, match=message):
        build(config)


class TestOptions:
    def run(self, attack, model, task, benign=None, steps=1):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            work = attack.run(model, task, benign=benign, generator=generator, device=CPU)
            return [float(next(work)) for _ in range(steps + 1)]

    def test_burn_in_is_ten_times_the_rate_and_then_the_rate(self, trained, restricted):
        high, low = trained.clone(), trained.clone()
        self.run(FineTuning(Strategy("direct", "all", "sgd", 1e-2, 20), burn_in=2), high, restricted, steps=2)
        self.run(FineTuning(Strategy("direct", "all", "sgd", 1e-1, 20)), low, restricted, steps=2)
        for own, other in zip(high.parameters(), low.parameters(), strict=True):
            assert torch.equal(own, other)
        moved = [m.clone() for m in (trained, trained)]
        self.run(FineTuning(Strategy("direct", "all", "sgd", 1e-2, 20), burn_in=1), moved[0], restricted, steps=2)
        twice = [torch.cat([p.flatten() for p in m.parameters()]) for m in (moved[0], high, trained)]
        assert (twice[0] - twice[2]).norm() < (twice[1] - twice[2]).norm()

    def test_replay_keeps_the_benign_task(self, trained, benign, restricted):
        scores = []
        for replay in (0.0, 2.0):
            model, head = trained.clone(), copy.deepcopy(trained.head)
            attack = FineTuning(Strategy("head", "all", "sgd", 0.2, 20), replay=replay)
            self.run(attack, model, restricted, benign, steps=60)
            assert restricted.score(model) > 0.6
            model.put_head(head)
            scores.append(benign.score(model))
        assert scores[1] > scores[0] + 0.1

    def test_replay_leaves_statistics_to_the_restricted_task(self, trained, benign, restricted):
        still = FineTuning(Strategy("direct", "all", "sgd", 1e-30, 20), replay=1.0)
        model, plain = trained.clone(), trained.clone()
        self.run(still, model, benign.few_shot(3, 0), restricted)
        self.run(FineTuning(still.strategy), plain, benign.few_shot(3, 0))
        assert torch.equal(model.network.body[1].running_mean, plain.network.body[1].running_mean)
        assert model.network.body[1].momentum == 0.1

    @pytest.mark.parametrize("option", [{"replay": 1.0}, {"anchor": 1.0}, {"benign_first": 2}])
    def test_benign_data_need_the_benign_task(self, option, trained, restricted, run):
        with pytest.raises(HoldfastError, match="give the model's own task"):
            FineTuning(Strategy("head"), **option).attack(trained, restricted, budgets=(0, 1), run=run)

    def test_an_anchor_keeps_the_outputs(self, trained, benign, restricted):
        """Without it, the same attack leaves little of the benign task; it learns the restricted one as well."""
        scores = []
        for anchor in (0.0, 2.0):
            model, head = trained.clone(), copy.deepcopy(trained.head)
            self.run(FineTuning(Strategy("head", "all", "sgd", 0.2, 20), anchor=anchor), model, restricted, benign, 60)
            assert restricted.score(model) > 0.6
            model.put_head(head)
            scores.append(benign.score(model))
        assert scores[1] > scores[0] + 0.1

    def test_an_anchors_gradient_is_that_of_the_written_out_divergence(self, trained, benign, restricted):
        """KL(released || attacked) of class probabilities, in sums and logarithms, at a model that has moved."""
        model = trained.clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        beside = BenignTraining(
            model, trained.clone().eval(), benign, Strategy(batch_size=20), replay=0.0, anchor=0.7,
            generator=torch.Generator().manual_seed(0), device=CPU,
        )  # fmt: skip
        twin = model.clone().eval()
        beside.model.eval()
        beside.penalty().backward()
        x = next(benign.batches("train", 20, generator=torch.Generator().manual_seed(0), device=CPU)).x
        p, q = trained.eval()(x).softmax(1).detach(), twin(x).softmax(1)
        (0.7 * sum((a * (a / b).log()).sum() for a, b in zip(p, q, strict=True)) / len(x)).backward()
        body = [n for n, _ in model.named_parameters() if not n.startswith(f"network.{model.head_name}")]
        own, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
        for name in body:
            assert torch.allclose(own[name].grad, theirs[name].grad, atol=1e-6), name
        assert all(p.grad is None for p in model.head.parameters())  # the released head is another copy

    def test_an_anchor_is_of_the_model_as_received(self, trained, benign, restricted):
        """A new last block is drawn towards the released outputs, not towards those of the fresh block."""
        model, head = trained.clone(), copy.deepcopy(trained.head)
        attack = FineTuning(Strategy("last-block", "all", "adam", 3e-3, 20), anchor=20.0)
        self.run(attack, model, restricted, benign, 0)
        before = self.as_released(model, head, benign)
        self.run(attack, model := trained.clone(), restricted, benign, 60)
        assert self.as_released(model, head, benign) > before + 0.3

    def as_released(self, model, head, benign):
        model.put_head(copy.deepcopy(head))
        return benign.score(model)

    def test_an_anchor_works_for_denoisers(self, denoiser, digit_images):
        benign, restricted = (task.few_shot(20, 0) for task in digit_images)
        moved = []
        for anchor in (0.0, 10.0):
            model = denoiser.clone()
            attack = FineTuning(Strategy("direct", "all", "adam", 3e-3, 10), anchor=anchor)
            self.run(attack, model, restricted, benign, 6)
            x = next(benign.sweep("test", 50, device=CPU)).x
            with torch.no_grad():
                moved.append(float((model.eval()(x) - denoiser.eval()(x)).square().mean()))
        assert moved[1] < moved[0]

    @pytest.mark.parametrize("options", [{"anchor": 5.0}, {"replay": 1.0, "anchor": 5.0}, {"benign_first": 3}])
    def test_benign_data_of_a_table_with_values(self, options, run):
        """A regression, whose outputs are compared by their squared distance."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
        weights = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        benign, restricted = (
            RegressionTask(name, x[:100], (x[:100] @ weights)[:, i], x[100:], (x[100:] @ weights)[:, i])
            for i, name in enumerate(("own", "other"))
        )
        with run.seeded("initialise"):
            fresh = SplitModel(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)), "2")
        released = pretrain(fresh, benign, steps=150, run=run)
        strategy = Strategy("head", "all", "adam", 1e-2, 50)
        plain, held = (
            FineTuning(strategy, **more).attack(
                released, restricted, budgets=(0, 60), run=run, benign=benign, score_benign=True
            )
            for more in ({}, options)
        )
        assert held.finite
        assert held.scores[1] > held.scores[0] + 0.1
        if "anchor" in options:
            assert held.benign_after > plain.benign_after

    def test_benign_first_is_benign_training_and_then_the_attack(self, trained, benign, restricted):
        """The steps in two parts, by hand: the body through the released head, then the restricted task as usual."""
        strategy = Strategy("head", "all", "momentum", 0.01, 20, schedule="cosine", schedule_steps=9)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, twin = trained.clone(), trained.clone()
            losses = self.run(FineTuning(strategy, benign_first=3), model, restricted, benign, steps=5)[1:]
            torch.manual_seed(0)
            kept = copy.deepcopy(twin.head).requires_grad_(False)
            start(twin, strategy, restricted)
            own, generator, found = twin.head, torch.Generator().manual_seed(0), []
            twin.put_head(kept)
            constant = Strategy("head", "all", "momentum", 0.01, 20)
            found += islice(finetune(twin, benign, constant, generator=generator, device=CPU), 3)
            twin.put_head(own)
            found += islice(finetune(twin, restricted, strategy, generator=generator, device=CPU), 2)
        assert losses == [float(loss) for loss in found]
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    def test_benign_first_is_paid_for(self, trained, benign, restricted, run):
        """At budgets within it the head for the restricted task is still the fresh one."""
        attack = FineTuning(Strategy("head", "all", "adam", 2e-3, 20), benign_first=20)
        curve = attack.attack(trained, restricted, budgets=(0, 20, 80), run=run, benign=benign)
        assert curve.scores[1] < 0.45
        assert curve.scores[2] > 0.7


def test_fine_tunings_config_says_it_all():
    strategy = Strategy("head", "all", "momentum", 0.01, 20, 1e-4)
    config = FineTuning(strategy).config()
    assert config.pop("kind") == "finetuning"
    assert Strategy(**config) == strategy
    assert FineTuning(strategy).name == "initFC+all momentum 0.01 b20 wd0.0001"


def test_scores_are_the_frameworks(model, benign, run):
    """A plug-in that claims success and does nothing gets the score that it earned."""

    class Boaster(Adversary):
        name, batch_size = "boaster", 1

        def config(self):
            return {}

        def run(self, model, task, *, benign, generator, device):
            while True:
                yield torch.tensor(0.0)

    curve = Boaster().attack(model, benign, budgets=[0, 5], run=run)
    assert curve.scores == [benign.score(model)] * 2


def test_a_curve_counts_the_samples_that_a_step_really_had(model, benign, run):
    few = benign.few_shot(2, 0)
    attack = FineTuning(Strategy(batch_size=50))
    assert attack.attack(model, few, budgets=[0, 1], run=run).batch_size == 10
    assert attack.attack(model, benign, budgets=[0, 1], run=run).batch_size == 50


def test_attack_is_final():
    assert getattr(Adversary.attack, "__final__", False)


def test_an_explosion_is_recorded_not_hidden(model, benign, run):
    wild = FineTuning(Strategy("direct", "all", "sgd", 1e20, 20))
    curve = wild.attack(model, benign, budgets=[0, 10], run=run)
    assert not curve.finite
    assert curve.scores[0] is not None
    assert curve.scores[1] is None


class TestBatteries:
    def test_unknown(self):
        with pytest.raises(HoldfastError, match="did you mean 'quick-v1'"):
            battery("quik-v1")

    @pytest.mark.parametrize(
        ("name", "frozen"),
        [
            ("quick-v1", "d078379561a91e2eb9728aa528a17de0d20c37ce19110780841de905b6699814"),
            ("quick-v2", "0ef55830a764e95f81b177b6169a2971d5c5e5d7267533f865d5df245334b5ea"),
            ("probes-v1", "640054c82829dcd9844023cc49b970bf1acdb28d43de0b2b977b6d72abf87599"),
            ("generation-v1", "7500a918c077bf2c54544332a6e0cfa44024554fa31c4156c3b186c35b917854"),
            ("language-v1", "93d471fe4325ad3fc6cfffaebac239cbb2594a8a88c17e8ad6dedd776ba57e0b"),
            ("causal-quick-v1", "6944ab1884e871b51bbd2db919c796c1bed49ef5126636d5fb5e0dd50a3f23d2"),
            ("causal-v1", "77ca3b1587be4ae5bb767805d33a06450827e574d8ca3f92ac8ed6813d120283"),
            ("causal-v2", "2fd1d1c960b0b161b32fd8e9179969e31352c4c8f3c8da9b6e995f34971a12a4"),
            ("text-to-image-quick-v1", "fced912d7e98f7c7f301760cb82efb928cf28596fbd5fc732265b8e9d5f4041e"),
            ("text-to-image-v1", "f3f6dfe221ee2a45a9c9b768628e416b99b57cc5a82ebbe8e010dba9df90ef21"),
            ("standard-v1", "f72a3f52a5a82834788f8dd1955b1984b1af78a4decfd3785566de87db024f79"),
            ("standard-v2", "13561b184e907fa220bd50a934e4b637da185e9dad7a0b51a38074f5407014e5"),
        ],
    )
    def test_a_published_battery_never_changes(self, name, frozen):
        """If this fails: do not change the hash. Give the new battery a new name."""
        assert fingerprint({a.name: a.config() for a in BATTERIES[name]}) == frozen

    @pytest.mark.parametrize(
        ("name", "frozen"),
        [
            ("adaptive-v1", "f22df2d95c5dfeeed60b60059aeaec7447188998f85fb53d92e87de6dc9ee680"),
            ("adaptive-causal-v1", "c06b83a098de6a0cf998cfe02ecb6c29145f1f91ec97f58e350734a3149262af"),
        ],
    )
    def test_nor_does_a_published_search(self, name, frozen):
        """New settings of `Strategy` and `FineTuning` are for a new search."""
        assert fingerprint(SEARCHES[name].config()) == frozen

    def test_quick_covers_what_it_says(self):
        strategies = [a.strategy for a in battery("quick-v1")]
        assert 6 <= len(strategies) <= 8
        assert {(s.initialisation, s.scope) for s in strategies} == {
            ("direct", "all"),
            ("head", "all"),
            ("head", "head"),
        }
        assert {"adam", "momentum"} <= {s.optimizer for s in strategies}
        rates = [s.learning_rate for s in strategies]
        assert min(rates) <= 1e-4
        assert max(rates) >= 1e-2
        assert Strategy("direct", "all", "momentum", 1e-4, 50, 1e-4) in strategies  # the paper's default attack

    def test_generation_covers_what_it_says_and_all_of_it_can_be_run_on_a_denoiser(self, denoiser, digit_images):
        members = [a for a in battery("generation-v1") if isinstance(a, FineTuning)]
        strategies = [a.strategy for a in members]
        assert len(members) == len(battery("generation-v1")) == 15
        assert {s.initialisation for s in strategies} == set(get_args(Initialisation)) - {"shrink-perturb"}  # newer
        assert {"all", "norm", "lora", "lora-attention"} <= {s.scope for s in strategies}
        assert Strategy("direct", "all", "momentum", 1e-4, 50, 1e-4) in strategies  # the paper's default attack
        assert any(a.undo for a in members)
        assert all(a.not_applicable(denoiser, digit_images[1]) is None for a in members)

    @pytest.mark.parametrize("name", ["standard-v1", "probes-v1", "quick-v1"])
    def test_of_others_a_denoiser_takes_what_it_has_a_place_for(self, name, denoiser, digit_images, run):
        task, ran = digit_images[1].few_shot(4, 0).limit_test(4, 0), set()
        for attack in battery(name):
            if attack.not_applicable(denoiser, task) is None:
                assert not isinstance(attack, Probe)
                place = attack.strategy.initialisation, attack.strategy.scope, attack.strategy.gradient
                # Not the same with another optimizer or rate, nor moves: test_moves.py makes all of them on a denoiser.
                if place in ran or attack.undo:
                    continue
                ran.add(place)
                assert attack.attack(denoiser, task, budgets=[0, 1], run=run).scores[0] is not None
            else:
                assert isinstance(attack, Probe) or attack.undo

    def test_standard_covers_what_it_says(self):
        tuned = [a for a in battery("standard-v1") if isinstance(a, FineTuning)]
        assert 24 <= len(battery("standard-v1")) <= 40
        strategies = [a.strategy for a in tuned]
        assert {s.initialisation for s in strategies} == set(get_args(Initialisation)) - {"shrink-perturb"}  # newer
        newer = {"lora-attention", "embeddings", "qlora", "cross-attention"}
        assert {s.scope for s in strategies} == set(get_args(Scope)) - newer
        assert {s.optimizer for s in strategies} == set(OPTIMIZERS) - {"sgd", "adafactor"}  # newer
        rates = [s.learning_rate for s in strategies]
        assert max(rates) >= 1e4 * min(rates)
        moves = {move for a in tuned for move in a.undo}
        assert moves == {move for each in MOVES.values() for move in each} - {"thaw", "insert"}  # others are newer
        assert "normalised" in {s.gradient for s in strategies}

    def test_the_second_standard_begins_as_the_quick_one_and_shows_images_in_every_way(self):
        members = battery("standard-v2")
        assert members[: len(battery("quick-v2"))] == battery("quick-v2")
        moves = {move for a in members if isinstance(a, FineTuning) for move in a.undo}
        assert {name for name in UNDO if name.endswith("-inputs")} <= moves
        assert {"negate-head", "widen", "low-rank", "round-int8", *(f"renew-quarter-{k}" for k in range(1, 5))} <= moves
        assert any(isinstance(a, FineTuning) and a.distil_first for a in members)

    def test_standard_runs_on_networks_without_batch_normalisation(self, benign):
        """Of several moves, one that has nothing to do does not keep the others from being made."""
        plain = load_model(ModelSpec(name="cnn", options={"norm": "none"}), benign)
        out = {a.name for a in battery("standard-v1") if a.not_applicable(plain, benign)}
        assert out == {"last-block+norm nesterov 1 b50"}

    def test_every_member_can_be_built_from_its_config(self):
        for adversaries in BATTERIES.values():
            for adversary in adversaries:
                assert build(adversary.config()).config() == adversary.config()

    def test_names_are_unique(self):
        for adversaries in BATTERIES.values():
            assert len({a.name for a in adversaries}) == len(adversaries)

    def test_direct_needs_enough_outputs(self, model):
        task = load_task("digits")
        reasons = {a.name: a.not_applicable(model, task) for a in battery("quick-v1")}
        assert {n for n, r in reasons.items() if r} == {n for n in reasons if n.startswith("direct")}


class TestProbes:
    """What each solver must reach, against its closed form or against another solver."""

    @pytest.fixture
    def features(self, trained, restricted):
        return features(trained, restricted, "train")

    def curve(self, solver, preparation, trained, restricted, run, steps=(0, 1, 60), rate=0.1):
        return Probe(solver, preparation, rate).attack(trained, restricted, budgets=steps, run=run)

    def test_gradient_descent_takes_the_steps_of_the_theory(self, trained, restricted, run, features):
        problem = LeastSquares.of(*features)
        for solver in ("gd", "line-search"):
            found = self.curve(solver, "raw", trained, restricted, run, (0, 1, 2)).losses[1:]
            path = descend(problem, line_search=solver == "line-search")
            next(path)
            x, y = features
            own = [((x @ w - y).square().sum() / (2 * len(x))).item() for w in islice(path, 2)]
            assert found == pytest.approx(own, rel=1e-6)

    def test_whitened_features_are_solved_by_one_step(self, trained, restricted, run):
        curve = self.curve("line-search", "whitened", trained, restricted, run, (0, 1, 5))
        assert curve.losses[1] == pytest.approx(curve.losses[2], rel=1e-6)

    def test_l_bfgs_goes_on_where_a_step_is_hard(self, trained, restricted, run):
        early, late = self.curve("lbfgs", "raw", trained, restricted, run, (0, 5, 40)).losses[1:]
        adam = self.curve("adam", "raw", trained, restricted, run, (0, 5, 40), 0.01).losses[2]
        assert late < early / 2
        assert late < adam

    def test_ridge_is_the_closed_form(self, trained, restricted, run, features):
        curve = self.curve("ridge", "raw", trained, restricted, run, (0, 1))
        best = torch.linalg.lstsq(*features).solution
        bound = (features[0] @ best - features[1]).square().sum() / (2 * len(features[0]))
        assert bound.item() <= curve.losses[1] <= 1.5 * bound.item()

    @pytest.mark.parametrize("preparation", ["standardised", "whitened"])
    def test_preparation(self, features, preparation):
        x, _ = features
        mean, scale = prepare(x, preparation)
        ready = (x - mean) @ scale
        assert ready.mean(0).abs().max() < 1e-9
        covariance = ready.T @ ready / len(x)
        if preparation == "whitened":
            assert torch.allclose(covariance, torch.eye(len(covariance), dtype=torch.float64), atol=1e-8)
        else:
            deviation = x.std(0, correction=0)
            assert torch.allclose(covariance.diagonal()[deviation > 1e-9], torch.ones((), dtype=torch.float64))

    def test_the_body_is_left_alone_and_the_head_sees_float64(self, trained, restricted, run):
        seen = []

        class Looks(Adversary):
            name, batch_size, frozen_body = "looks", 1, True

            def config(self):
                return {}

            def run(self, model, task, *, benign, generator, device):
                seen.append((next(task.sweep("train", 3, device=device)).x, model))
                yield torch.zeros(())

        Looks().attack(trained, restricted, budgets=(0,), run=run)
        x, model = seen[0]
        assert x.dtype == torch.float64
        assert torch.allclose(x, features(trained, restricted, "train")[0][:3])
        assert [p.shape for p in model.parameters()] == [(5, x.shape[1]), (5,)]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (("gauss", "raw"), "Unknown solver"),
            (("gd", "normalised"), "Unknown preparation"),
            (("adam", "raw", 0), "learning_rate is 0"),
        ],
    )
    def test_refuses(self, settings, message):
        with pytest.raises(HoldfastError, match=message):
            Probe(*settings)
