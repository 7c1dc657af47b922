from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from cases import ADVERSARIES
from conftest import toy_task
from holdfast.adversaries import FineTuning, Probe
from holdfast.adversaries.batched import ELEMENTWISE, Member, attack_together, stackable, stacks
from holdfast.adversaries.undo.moves import UNDO
from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.models.families.builtin import CifarResNet
from holdfast.runtime.run import Run
from holdfast.training import Strategy, pretrain

BUDGETS = (0, 5, 40)
RATES = {"sgd": 0.05, "momentum": 5e-3, "nesterov": 5e-3, "adagrad": 5e-3, "adadelta": 0.5, "adam": 1e-3, "adamw": 1e-3}


def cnn(norm, task, run, steps=0):
    with run.seeded("initialise", norm):
        model = load_model(ModelSpec(name="cnn", options={"norm": norm, "width": 8, "hidden": 32}), task)
    return pretrain(model, task, steps=steps, run=run) if steps else model


@pytest.fixture(scope="module")
def models(benign):
    """Trained and fresh, without BatchNorm."""
    run = Run(seed=0, device=torch.device("cpu"))
    return cnn("none", benign, run, 100), cnn("none", benign, run)


def alone(member, run, budgets=BUDGETS):
    m = member
    return m.adversary.attack(m.model, m.task, budgets=budgets, run=run, role=m.role, seed=m.seed)


def assert_same(curves, expected, tolerance=1e-4):
    assert len(curves) == len(expected)
    for found, own in zip(curves, expected, strict=True):
        for field in ("adversary", "role", "seed", "budgets", "batch_size"):
            assert getattr(found, field) == getattr(own, field)
        assert found.losses == pytest.approx(own.losses, abs=tolerance)
        # Rounding may turn a test sample whose best two classes are equal: one of 60, in one fold of 20.
        assert found.scores == pytest.approx(own.scores, abs=1 / 60 + tolerance)
        for a, b in zip(found.folds, own.folds, strict=True):
            assert sum(abs(x - y) > tolerance for x, y in zip(a, b, strict=True)) <= 1


class TestTheSameCurvesAsAlone:
    @pytest.mark.parametrize("optimizer", sorted(ELEMENTWISE))
    def test_every_optimizer_with_other_rates_decays_starts_roles_and_seeds(self, optimizer, models, restricted, run):
        trained, fresh = models
        rate = RATES[optimizer]
        members = [
            Member(FineTuning(Strategy(start, "all", optimizer, lr, 20, decay)), model, restricted, role, seed)
            for seed, (start, lr, decay, role, model) in enumerate([
                ("direct", rate, 0.0, "immunized", trained),
                ("head", rate / 10, 0.1, "original", trained),
                ("head", rate, 0.01, "scratch", fresh),
            ])
        ]  # fmt: skip
        assert [len(group) for group in stacks(members)] == [3]
        expected = [alone(m, run) for m in members]
        assert_same(attack_together(members, budgets=BUDGETS, run=run), expected)
        assert len({tuple(c.losses) for c in expected}) == 3
        assert expected[0].losses[2] < expected[0].losses[1]

    @pytest.mark.parametrize(
        ("norm", "scope"), [("none", "all"), ("none", "head"), ("batch", "all"), ("batch", "head"), ("batch", "norm")]
    )
    def test_every_scope(self, norm, scope, benign, restricted, run):
        model = cnn(norm, benign, run, 30)
        members = [
            Member(FineTuning(Strategy(start, scope, "sgd", 0.02, 30)), model, restricted, "immunized", seed)
            for start in ("direct", "last-block") for seed in (0, 1)
        ]  # fmt: skip
        assert [len(group) for group in stacks(members)] == [4]
        assert_same(attack_together(members, budgets=(0, 8), run=run), [alone(m, run, (0, 8)) for m in members])

    @pytest.mark.parametrize("norm", ["none", "batch"])
    def test_every_move_that_changes_weights_alone(self, norm, benign, restricted, run):
        """A move may draw from the generator of the batches, and leaves layers and settings as they are."""
        model = cnn(norm, benign, run, 30)
        moves = [name for name in UNDO if UNDO[name].weights_only]
        assert len(moves) > 10
        made = [FineTuning(Strategy("head", "all", "sgd", 0.02, 30), undo=(name,)) for name in moves]
        members = [
            Member(a, model, restricted, "immunized", seed, repaired=True)
            for a in made if a.not_applicable(model, restricted) is None
            for seed in (0, 1)
        ]  # fmt: skip
        budgets = (0, 2)
        assert [len(group) for group in stacks(members)] == [len(members)]
        assert_same(attack_together(members, budgets=budgets, run=run), [alone(m, run, budgets) for m in members])
        assert all(len(group) == 1 for group in stacks([replace(m, repaired=False) for m in members]))

    def test_a_plain_chain_on_vectors_and_a_head_of_other_width(self, run):
        task = toy_task(3)
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 8), nn.GELU()), nn.Linear(8, 5)
        )
        model = SplitModel(network, "3")
        members = [
            Member(FineTuning(Strategy(start, "all", "adam", 1e-2, 16)), model, task, "immunized", seed)
            for start in ("direct", "head") for seed in (0, 1)
        ]  # fmt: skip
        groups = stacks(members)
        assert [len(group) for group in groups] == [2, 2]  # 5 outputs and 3
        for group in groups:
            assert_same(attack_together(group, budgets=BUDGETS, run=run), [alone(m, run) for m in group])

    @pytest.mark.parametrize(
        "body",
        [
            (nn.Conv2d(1, 4, 3, stride=2, padding="valid"), nn.LeakyReLU(0.2), nn.AvgPool2d(2)),
            (nn.Conv2d(1, 4, 3, dilation=2, bias=False), nn.Conv2d(4, 6, 1, groups=2), nn.MaxPool2d(2), nn.SiLU()),
            (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3)),
        ],
    )
    def test_image_layers_with_their_settings(self, body, restricted, run):
        torch.manual_seed(0)
        body = nn.Sequential(*copy.deepcopy(body), nn.Flatten())
        width = body(torch.zeros(1, 1, 8, 8)).shape[1]
        model = SplitModel(nn.Sequential(body, nn.Linear(width, 5)), "1", mean=[0.5], std=[0.5])
        members = [Member(FineTuning(Strategy()), model, restricted, "immunized", seed) for seed in (0, 1, 2)]
        assert [len(group) for group in stacks(members)] == [3]
        assert_same(attack_together(members, budgets=(0, 20), run=run), [alone(m, run, (0, 20)) for m in members])

    def test_few_samples_and_another_task_each(self, models, restricted, run):
        members = [
            Member(FineTuning(Strategy("head")), models[0], restricted.few_shot(3, seed), "immunized", seed)
            for seed in (0, 1)
        ]
        assert [len(group) for group in stacks(members)] == [2]
        assert_same(attack_together(members, budgets=(0, 20), run=run), [alone(m, run, (0, 20)) for m in members])

    def test_one_is_simply_run(self, models, restricted, run):
        member = Member(Probe("ridge"), models[0], restricted, "immunized", 0)
        assert attack_together([member], budgets=(0, 1), run=run) == [alone(member, run, (0, 1))]

    def test_models_and_generators_are_left_alone(self, models, restricted, run):
        members = [Member(FineTuning(Strategy()), models[0], restricted, "immunized", seed) for seed in (0, 1)]
        digest = models[0].facts().sha256
        torch.manual_seed(7)
        before = torch.get_rng_state()
        first = attack_together(members, budgets=(0, 5), run=run)
        assert torch.equal(torch.get_rng_state(), before)
        assert models[0].facts().sha256 == digest
        assert attack_together(members, budgets=(0, 5), run=run) == first


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_one_that_explodes_does_not_harm_the_others(norm, benign, restricted, run):
    model = cnn(norm, benign, run, 30)
    tame = [
        Member(FineTuning(Strategy("direct", "all", "sgd", 0.02)), model, restricted, "immunized", s) for s in (0, 1)
    ]
    wild = Member(FineTuning(Strategy("direct", "all", "sgd", 1e30)), model, restricted, "immunized", 0)
    first, broken, second = attack_together([tame[0], wild, tame[1]], budgets=(0, 15), run=run)
    assert_same([first, second], [alone(m, run, (0, 15)) for m in tame])
    own = alone(wild, run, (0, 15))
    assert broken.scores == [pytest.approx(own.scores[0], abs=1 / 60), None]
    assert own.scores[1] is None
    assert broken.losses == own.losses == [None, None]
    assert broken.folds[1] is own.folds[1] is None


class TestGroups:
    def members(self, models, restricted):
        return [
            Member(FineTuning(Strategy(start, scope, optimizer, rate, size)), model, restricted, role, seed)
            for role, model in (("immunized", models[0]), ("scratch", models[1]))
            for seed in (0, 1)
            for start, scope in (("direct", "all"), ("head", "all"), ("head", "head"))
            for optimizer in ("adam", "sgd")
            for rate in (1e-3, 1e-2)
            for size in (20, 50)
        ]

    def test_are_of_the_same_kind_and_never_change(self, models, restricted):
        members = self.members(models, restricted)
        groups = stacks(members)
        assert len(groups) == 8
        for group in groups:
            assert len({(s.optimizer, s.scope, s.batch_size) for s in (m.adversary.strategy for m in group)}) == 1
            assert {m.role for m in group} == {"immunized", "scratch"}
        places = [members.index(m) for group in groups for m in group]
        assert sorted(places) == list(range(len(members)))
        assert [members.index(group[0]) for group in groups] == sorted(members.index(group[0]) for group in groups)
        assert stacks(members) == groups

    def test_have_a_limit(self, models, restricted):
        members = [Member(FineTuning(Strategy()), models[0], restricted, "immunized", s) for s in range(7)]
        assert [[m.seed for m in g] for g in stacks(members, 3)] == [[0, 1, 2], [3, 4, 5], [6]]

    def test_keep_apart_what_differs(self, models, benign, restricted, run):
        plain = Member(FineTuning(Strategy()), models[0], restricted, "immunized", 0)
        other_norm = copy.deepcopy(models[0])
        other_norm.std = other_norm.std * 2
        other_stride = copy.deepcopy(models[0])
        other_stride.network.body[2].stride = (1, 1)
        other_stride.network.body[2].kernel_size = (1, 1)
        for model in (other_norm, other_stride, copy.deepcopy(models[0]).double()):
            assert len(stacks([plain, Member(plain.adversary, model, restricted, "original", 0)])) == 2
        alone_anyway = Member(ADVERSARIES["probe-gd-raw"], models[0], restricted, "immunized", 0)
        assert [len(g) for g in stacks([alone_anyway, plain, alone_anyway, plain])] == [1, 2, 1]

    def test_a_task_with_a_loss_of_its_own_is_alone(self, models, restricted):
        class Own(type(restricted)):
            def loss(self, model, batch):
                return super().loss(model, batch) * 2

        task = copy.copy(restricted)
        task.__class__ = Own
        members = [Member(FineTuning(Strategy()), models[0], task, "immunized", s) for s in (0, 1)]
        assert [len(g) for g in stacks(members)] == [1, 1]

    def test_others_are_refused(self, models, restricted, run):
        members = [
            Member(FineTuning(Strategy("head", "all", name)), models[0], restricted, "immunized", 0)
            for name in ("adam", "sgd")
        ]
        with pytest.raises(HoldfastError, match="cannot be trained together: initFC"):
            attack_together(members, budgets=(0, 1), run=run)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked(model):
    model.network[0].register_forward_hook(lambda *_: None)


def _gradient_hook(model):
    model.network[0].weight.register_hook(torch.zeros_like)


def _own_forward(model):
    model.network[0].forward = lambda x: x


def _hidden_weight(model):
    weight = model.network[0].weight
    del model.network[0].weight
    model.network[0].weight = weight.detach()


def _buffer(model):
    model.network[0].register_buffer("scale", torch.ones(1))


def _tied(model):
    model.network[2].weight = model.network[0].weight


def _mixed(model):
    model.network[0].double()


def _parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.network[0])


class TestWhoIsAlone:
    def chain(self, *layers):
        return SplitModel(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), *layers, nn.Linear(8, 8)), str(2 + len(layers)))

    def test_a_plain_chain_is_not(self):
        assert stackable(FineTuning(Strategy()), self.chain())

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Dropout(0.5),
            nn.BatchNorm1d(8),
            nn.LayerNorm(8),
            Doubling(8, 8),
            nn.Flatten(0),
            nn.RReLU(),
            nn.Linear(8, 8),
        ],
    )
    def test_unknown_layers(self, layer):
        assert stackable(FineTuning(Strategy()), self.chain(layer)) == (type(layer) is nn.Linear)

    @pytest.mark.parametrize(
        "change",
        [_hooked, _gradient_hook, _own_forward, _hidden_weight, _buffer, _tied, _mixed, _parametrized],
    )
    def test_known_layers_that_do_something_of_their_own(self, change):
        model = self.chain()
        change(model)
        assert not stackable(FineTuning(Strategy()), model)

    def test_networks_with_code_of_their_own(self):
        class Skipping(nn.Sequential):
            def forward(self, x):
                return self[1](x)

        assert not stackable(FineTuning(Strategy()), SplitModel(Skipping(nn.ReLU(), nn.Linear(4, 2)), "1"))
        residual = SplitModel(CifarResNet((3, 8, 8), 5, depth=8), "linear")
        assert not stackable(FineTuning(Strategy()), residual)

    def test_large_models(self):
        model = SplitModel(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 5)), "1")
        assert not stackable(FineTuning(Strategy()), model)

    def test_an_extractor_in_the_way(self, models):
        model = models[0].clone()
        model.insert_extractor(torch.eye(32, dtype=torch.float64))
        assert not stackable(FineTuning(Strategy()), model)

    @pytest.mark.parametrize(
        "adversary",
        [
            Probe(),
            FineTuning(Strategy(), undo=("rescale",)),
            FineTuning(Strategy(), burn_in=3),
            FineTuning(Strategy(), replay=0.5),
            FineTuning(Strategy(), anchor=0.5),
            FineTuning(Strategy(), benign_first=2),
            FineTuning(Strategy(schedule="cosine", schedule_steps=9)),
            FineTuning(Strategy(warmup=2)),
            FineTuning(Strategy(optimizer="adafactor")),  # its step depends on the mean of a whole tensor
            FineTuning(Strategy(gradient="sign")),
            FineTuning(Strategy(scope="embeddings")),
            FineTuning(Strategy(scope="lora")),
            FineTuning(Strategy(scope="last-block")),
        ],
    )
    def test_adversaries_that_are_not_plain(self, adversary):
        assert not stackable(adversary, self.chain())

    def test_subclasses_of_fine_tuning(self):
        class Mine(FineTuning):
            pass

        assert not stackable(Mine(Strategy()), self.chain())
