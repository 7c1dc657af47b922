from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from conftest import toy_task
from holdfast.adversaries import UNDO, FineTuning
from holdfast.adversaries.undo.feature_conditioning import Prepared
from holdfast.adversaries.undo.gradient_bypass import Flowing, activations
from holdfast.adversaries.undo.moves import not_applicable
from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, load_model, transplant
from holdfast.tasks import ArrayTask, Batch, load_task
from holdfast.training import Strategy
from zoo import ZOO, make
from zoo.settings import zoo_tasks

CPU = torch.device("cpu")
KEEP_OUTPUTS = (
    "thaw", "activation", "fold", "balance", "whiten", "standardise", "insert", "insert-between", "widen",
)  # fmt: skip


def undo(move, model, task, reference=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = reference or (model.fresh() if model.not_renewable() is None else model)
        UNDO[move](model, reference, task, torch.Generator().manual_seed(0), CPU)
    return model


def inputs(task, n=200):
    return next(task.sweep("train", n, device=CPU)).x


def mlp(task, widths=(16, 12), outputs=5, factory=True):
    def build():
        layers: list[nn.Module] = [nn.Flatten()]
        width = 64
        for out in widths:
            layers += [nn.Linear(width, out), nn.ReLU()]
            width = out
        return nn.Sequential(*layers, nn.Linear(width, outputs))

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return SplitModel(build(), str(2 * len(widths) + 1), factory=build if factory else None)


class TestOutputsStay:
    @pytest.mark.parametrize("move", KEEP_OUTPUTS)
    @pytest.mark.parametrize("name", ["cnn", "mlp"])
    def test_of_trained_and_of_fresh_networks(self, move, name, benign, trained):
        model = trained.clone() if name == "cnn" else load_model("mlp", benign)
        x = inputs(benign)
        before = model.eval()(x)
        training = model.training
        undo(move, model, benign)
        assert model.training == training
        assert torch.allclose(model.eval()(x), before, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("move", ["whiten", "standardise", "insert"])
    def test_of_a_convolutional_head_without_bias(self, move, benign):
        body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
        network = nn.Sequential(body, nn.Conv2d(6, 5, 1, bias=False), nn.AdaptiveAvgPool2d(1))
        model = SplitModel(network, "1")
        before = model(inputs(benign))
        undo(move, model, benign)
        assert torch.allclose(model(inputs(benign)), before, atol=1e-5)
        assert model.head_name == "1.1"

    def test_with_a_badly_conditioned_extractor(self, trained, benign):
        theta = torch.diag(torch.logspace(0, -7, 64, dtype=torch.float64))
        model = trained.clone()
        model.insert_extractor(theta)
        before = model.eval()(inputs(benign))
        undo("whiten", model, benign)
        assert torch.allclose(model.eval()(inputs(benign)), before, atol=1e-4)


class TestBeforeTheHead:
    @pytest.mark.parametrize("move", ["whiten", "standardise"])
    def test_what_a_fresh_head_gets(self, move, benign):
        model = mlp(benign)
        with torch.no_grad():  # a constant feature and a tiny one
            model.network[3].weight[0], model.network[3].bias[0] = 0, 1
            model.network[3].weight[1] *= 1e-4
        undo(move, model, benign)
        model.reset_head(3)
        assert model.num_outputs == 3
        z = model.features(torch.cat([b.x for b in benign.sweep("train", 250, device=CPU)])).double()
        alive = z.std(0, correction=0) > 1e-6
        covariance = (z.T @ z / len(z))[alive][:, alive]
        assert z.mean(0).abs().max() < 1e-6
        expected = torch.eye(len(covariance), dtype=torch.float64)
        if move == "standardise":
            assert torch.allclose(covariance.diagonal(), expected.diagonal(), atol=1e-6)
        else:
            values = torch.linalg.eigvalsh(z.T @ z / len(z))
            assert ((values - 1).abs() < 1e-5).logical_or(values < 1e-5).all()
            assert (values > 0.5).sum() >= 8

    @pytest.mark.parametrize("move", ["whiten", "standardise"])
    def test_constant_features_are_left(self, move, benign):
        model = mlp(benign)
        nn.init.zeros_(model.network[3].weight)
        undo(move, model, benign)
        assert model.head_name == "5"

    @pytest.mark.parametrize("start", ["last-block", "last-half"])
    def test_blocks_that_start_anew_come_first(self, start, trained, benign, run):
        """What a prepared head gets comes from the new blocks, and has mean 0 and deviation 1."""
        attack = FineTuning(Strategy(start, "all", "adam", 1e-3, 20), undo=("standardise",))
        model = trained.clone()
        with torch.random.fork_rng():
            next(attack.run(model, benign, benign=None, generator=torch.Generator(), device=CPU))
        z = model.eval().features(torch.cat([b.x for b in benign.sweep("train", 250, device=CPU)])).double()
        varying = z.std(0, correction=0) > 1e-6
        assert varying.sum() > 8
        assert z.mean(0)[varying].abs().max() < 1e-4
        assert (z.std(0, correction=0)[varying] - 1).abs().max() < 1e-3

    def test_an_inserted_layer_is_trained_even_with_the_head_alone(self, trained, benign, run):
        attack = FineTuning(Strategy("head", "head", "adam", 1e-2, 20), undo=("insert",))
        model = trained.clone()
        work = attack.run(model, benign, benign=None, generator=torch.Generator(), device=CPU)
        next(work)
        moved = {n for n, p in model.network.named_parameters() if p.requires_grad}
        assert moved == {"head.0.weight", "head.1.weight", "head.1.bias"}
        next(work)
        assert not torch.equal(model.extractor_layer().weight, torch.eye(64, dtype=torch.float64))


class TestScales:
    @pytest.mark.parametrize("move", ["rescale", "equalise"])
    @pytest.mark.parametrize("factor", [1e-4, 1e4, 1e-18, 1e18, 1e-36])
    def test_a_scale_trick_is_undone(self, move, factor, benign):
        """Layers scaled against each other: the same function, and hopeless to train."""
        model = mlp(benign)
        x, reference = inputs(benign), mlp(benign)
        honest = model(x).argmax(1)
        first, second = model.network[1], model.network[3]
        with torch.no_grad():
            first.weight *= factor
            first.bias *= factor
            second.weight /= factor
        undo(move, model, benign, reference)
        for own, other in zip(model.network, reference.network, strict=True):
            if isinstance(own, nn.Linear):
                assert torch.allclose(own.weight, other.weight, rtol=1e-3, atol=1e-6)
                assert torch.allclose(own.bias, other.bias, rtol=1e-2, atol=1e-5)
        assert torch.equal(model(x).argmax(1), honest)

    def test_a_sound_network_is_left_by_equalise(self, benign):
        model, reference = mlp(benign), mlp(benign)
        undo("equalise", model, benign, reference)
        for own, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(own, other)

    def test_rescale_gives_every_layer_the_norm_of_the_reference(self, trained, benign):
        reference = trained.fresh()
        model = undo("rescale", trained.clone(), benign, reference)
        for name, layer in model.network.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                other = reference.network.get_submodule(name)
                assert layer.weight.norm().item() == pytest.approx(other.weight.norm().item(), rel=1e-5)

    @pytest.mark.parametrize("move", ["rescale", "equalise"])
    def test_batch_normalisation_goes_along(self, move, trained, benign):
        """In evaluation mode the network still says what it said."""
        model, x = trained.clone(), inputs(benign)
        honest = model.eval()(x).argmax(1)
        with torch.no_grad():
            model.network.body[0].weight *= 1e3
            model.network.body[1].running_mean *= 1e3
            model.network.body[1].running_var *= 1e6
        undo(move, model, benign)
        agree = (model.eval()(x).argmax(1) == honest).double().mean()
        assert agree > 0.97
        assert model.network.body[0].weight.norm() < 20

    @pytest.mark.parametrize("move", ["rescale", "equalise"])
    def test_scales_in_normalisation_layers(self, move, trained, benign):
        model, x = trained.clone(), inputs(benign)
        honest = model.eval()(x).argmax(1)
        with torch.no_grad():
            for parameter in model.network.body[1].parameters():
                parameter.mul_(1e5)
            model.network.body[4].weight *= 1e-5
        undo(move, model, benign)
        assert ((model.eval()(x).argmax(1) == honest).double().mean()) > 0.99
        assert 0.3 < model.network.body[1].weight.mean() < 3


class TestUnits:
    def test_single_units(self, trained, benign):
        """Scales of eight decades within a layer, behind BatchNorm and behind flattened maps, are gone."""
        model, honest = trained.clone(), trained.clone()
        with torch.no_grad():
            scale = torch.logspace(-4, 4, 16)
            for parameter in model.network.body[1].parameters():
                parameter.mul_(scale)
            model.network.body[4].weight /= scale.view(1, -1, 1, 1)
            wide = torch.logspace(-4, 4, 64)
            model.network.body[9].weight *= wide[:, None]
            model.network.body[9].bias *= wide
            model.head.weight /= wide
        undo("balance", model, benign, trained)
        x = inputs(benign)
        assert torch.allclose(model.eval()(x), honest.eval()(x), rtol=1e-3, atol=1e-3)
        for name in ("body.1", "body.4", "body.9"):
            own, other = (m.network.get_submodule(name).weight.detach() for m in (model, honest))
            ratio = own.abs().flatten(1).mean(1) / other.abs().flatten(1).mean(1) if own.dim() > 1 else own / other
            assert ratio.max() < 4
            assert ratio.min() > 0.25

    def test_honest_units_stay(self, benign):
        model, reference = mlp(benign), mlp(benign)
        undo("balance", model, benign, reference)
        for own, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(own, other)

    def test_what_would_change_the_outputs_is_taken_back(self, benign):
        class Skipping(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x):
                x = self.first(x)
                return x + self.second(torch.relu(x))

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = SplitModel(nn.Sequential(nn.Flatten(), Skipping(), nn.Linear(64, 5)), "2")
        reference = model.clone()
        with torch.no_grad():
            model.network[1].first.weight *= 1e3
        before = [p.clone() for p in model.parameters()]
        outputs = model(inputs(benign))
        undo("balance", model, benign, reference)
        assert torch.allclose(model(inputs(benign)), outputs, rtol=1e-3, atol=1e-2)
        assert torch.equal(model.network[1].first.weight, before[0])


UNDOES = {
    "shrunk-convolutions": ("rescale",),
    "grown-convolutions": ("rescale",),
    "huge-gamma": ("rescale",),
    "rescaled-pairs": ("rescale",),
    "saturated-head": ("rescale",),
    "huge-weight-norm": ("rescale",),
    "hidden-in-buffers": ("thaw", "rescale"),
    "unregistered-stem": ("rescale",),
    "poisoned-statistics": ("fold", "rescale"),
}
"""Shams, and the moves after which they are the original after the same moves; in its code, if they have their own."""


@pytest.mark.parametrize("name", UNDOES)
def test_a_sham_is_the_original_again(name, zoo_originals):
    _, restricted = zoo_tasks()
    original = zoo_originals[ZOO[name].setting]
    released = make(name)
    if name in ("grown-convolutions", "huge-weight-norm", "unregistered-stem"):
        released = transplant(released, original)
    few = restricted.few_shot(2, 0)
    reference = original.fresh()
    both = [released.clone(), original.clone()]
    for model in both:
        for move in UNDOES[name]:
            undo(move, model, few, reference)
    for key, value in both[1].network.state_dict().items():
        if "body" in key and "num_batches" not in key:
            own = both[0].network.state_dict()[key]
            # Poisoned statistics are large numbers, which cost digits when they are folded in.
            assert torch.allclose(own, value, rtol=1e-3, atol=1e-3 * float(value.abs().max())), key
    both[0].put_head(copy.deepcopy(both[1].head))  # a fresh head is what is trained; the released one may be another
    for training in (False, True):
        own, wanted = (m.train(training)(inputs(few)) for m in both)
        assert torch.allclose(own, wanted, rtol=1e-2, atol=1e-3 * float(wanted.detach().abs().max()))


def test_uneven_units_are_even_again(zoo_originals):
    benign, restricted = zoo_tasks()
    original = zoo_originals["none"]
    released = make("uneven-units")
    reference = original.fresh()
    undo("balance", released, restricted.few_shot(2, 0), reference)
    x = inputs(benign)
    assert torch.allclose(released(x), original(x), rtol=1e-3, atol=1e-3)
    for (name, own), fresh in zip(
        released.network.body.named_parameters(), reference.network.body.parameters(), strict=True
    ):
        if own.dim() > 1:
            ratio = own.flatten(1).norm(dim=1) / fresh.flatten(1).norm(dim=1)
            assert 0.2 < ratio.min() <= ratio.max() < 5, name


class TestFold:
    def test_training_mode_says_what_evaluation_says(self, trained, benign):
        model, few = trained.clone(), benign.few_shot(4, 0)
        norm = model.network.body[1]
        with torch.no_grad():  # nonsense that scale and shift make up for
            slope = norm.weight / (norm.running_var + norm.eps).sqrt()
            mean, variance = norm.running_mean + 50, norm.running_var * 1e6
            norm.bias.add_(slope * 50)
            norm.weight.copy_(slope * (variance + norm.eps).sqrt())
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        x = inputs(few)
        honest = trained.eval()(x)
        undo("fold", model, few)
        assert torch.allclose(model.eval()(x), honest, atol=1e-2)
        assert torch.allclose(model.clone().train()(x), honest, atol=1e-2)
        assert norm.weight.abs().max() < 10

    def test_a_senseless_eps_is_made_up_for(self, trained, benign):
        model = trained.clone()
        norm = model.network.body[1]
        norm.eps, norm.momentum = 1e4, 7.0
        before = model.eval()(inputs(benign))
        undo("fold", model, benign)
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
        assert torch.allclose(model.eval()(inputs(benign)), before, atol=1e-3)


class TestRecalibrate:
    def test_poisoned_statistics(self, trained, benign):
        model, few = trained.clone(), benign.few_shot(20, 0)
        norm = model.network.body[1]
        norm.running_mean.fill_(1e6)
        norm.running_var.fill_(float("nan"))
        norm.eps, norm.momentum = 1e3, 0.0
        undo("recalibrate", model, few)
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
        x = inputs(few)
        z = model.network.body[0]((x - model.mean) / model.std).detach().movedim(1, -1).flatten(0, -2)
        assert torch.allclose(norm.running_mean, z.mean(0), atol=1e-5)
        assert torch.allclose(norm.running_var, z.var(0), rtol=1e-4)
        assert benign.score(model) > 0.9

    def test_statistics_that_are_not_tracked(self, benign):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False))
        model = SplitModel(nn.Sequential(network, nn.Linear(8, 5)), "1")
        undo("recalibrate", model, benign)
        norm = model.network[0][2]
        assert norm.track_running_stats
        assert norm.running_var.min() > 0
        assert model.eval()(inputs(benign)[:1]).isfinite().all()

    def test_a_single_sample_has_no_variance(self, trained, benign):
        model = trained.clone()
        before = model.network.body[1].running_var.clone()
        undo("recalibrate", model, single(benign))
        assert torch.equal(model.network.body[1].running_var, before)

    def test_says_when_there_is_nothing(self, benign):
        assert "no BatchNorm" in not_applicable(("recalibrate",), mlp(benign), benign)
        attack = FineTuning(Strategy(), undo=("recalibrate",))
        assert "no BatchNorm" in attack.not_applicable(mlp(benign), benign)


class TestRevive:
    def test_only_the_dead(self, benign):
        model, reference = mlp(benign), mlp(benign, widths=(16, 12))
        with torch.no_grad():
            reference.network[1].weight.mul_(-1)
            for p in (model.network[1].weight, model.network[1].bias):
                p[:5] = -1e3
        alive = model.network[1].weight[5:].clone()
        undo("revive", model, benign, reference)
        assert torch.equal(model.network[1].weight[:5], reference.network[1].weight[:5])
        assert model.network[1].bias[:5].tolist() == [0] * 5
        unchanged = (model.network[1].weight[5:] == alive).all(1)
        assert unchanged.sum() >= 8  # a fresh ReLU unit may be dead on its own

    @pytest.mark.parametrize("layers", [(1,), (1, 3)])
    def test_layer_after_layer(self, layers, benign):
        model = mlp(benign)
        for layer in layers:
            nn.init.constant_(model.network[layer].bias, -1e6)
        undo("revive", model, benign)
        z = model.features(inputs(benign))
        assert (z.std(0) > 0).double().mean() > 0.5

    def test_behind_batch_normalisation_and_flattening(self, trained, benign):
        model = trained.clone()
        norm = model.network.body[5]
        with torch.no_grad():
            norm.weight[:] = 1e-3
            norm.bias[:] = -1.0
        assert model.features(inputs(benign)).std(0).max() == 0
        undo("revive", model, benign)
        assert norm.weight.tolist() == [1] * 32
        assert norm.running_var.tolist() == [1] * 32
        assert model.features(inputs(benign)).std(0).max() > 0

    def test_one_sample_makes_no_unit_dead_that_says_something(self, benign):
        model = mlp(benign)
        few = single(benign)
        before = model.network[1].weight.clone()
        dead = model.network[:3](inputs(few)).flatten() == 0
        undo("revive", model, few)
        assert torch.equal(model.network[1].weight[~dead], before[~dead])


class TestNoiseAndResets:
    def test_shrink_perturb(self, trained, benign):
        reference, model = trained.fresh(), trained.clone()
        undo("shrink-perturb", model, benign, reference)
        for (name, own), old, new in zip(
            model.network.named_parameters(), trained.parameters(), reference.parameters(), strict=True
        ):
            expected = 0.5 * old + 0.5 * new if own.dim() > 1 else old
            assert torch.allclose(own, expected, atol=1e-7), name

    def test_reset_worst_finds_what_was_tampered_with(self, benign):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = load_model(ModelSpec(name="mlp", options={"depth": 6}), benign)
            reference = model.fresh()
        with torch.no_grad():
            model.network.body[3].weight *= 1e-5
            model.network.body[9].weight *= 1e5
        before = {n: v.clone() for n, v in model.network.state_dict().items()}
        undo("reset-worst", model, benign, reference)
        changed = {n for n, v in model.network.state_dict().items() if not torch.equal(v, before[n])}
        assert changed == {"body.3.weight", "body.3.bias", "body.9.weight", "body.9.bias"}
        assert torch.equal(model.network.body[3].weight, reference.network.body[3].weight)


class Blocked(nn.Module):
    def forward(self, x):
        return x.detach()


class TestActivation:
    def test_gradients_reach_what_was_cut_off(self, benign):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Blocked(), nn.Sigmoid(), nn.Linear(8, 5))
        model = SplitModel(network, "4")
        assert len(activations(model)) == 2
        undo("activation", model, benign)
        model(inputs(benign)).sum().backward()
        assert network[1].weight.grad.abs().sum() > 0
        undo("activation", model, benign)
        assert not any(isinstance(m.inner, Flowing) for m in network if isinstance(m, Flowing))

    def test_in_place(self):
        x = torch.tensor([[-1.0, 1.0]], requires_grad=True)
        y = Flowing(nn.ReLU(inplace=True))(x * 1)
        y.sum().backward()
        assert y.tolist() == [[0, 1]]
        assert torch.allclose(x.grad, torch.tensor([[0.1, 1.1]]))

    def test_infinite_inputs_and_other_shapes(self, benign):
        assert Flowing(nn.Tanh())(torch.tensor([float("inf")])).tolist() == [1]
        assert Flowing(nn.MaxPool1d(2))(torch.ones(1, 1, 4)).shape == (1, 1, 2)
        assert "no activation" in not_applicable(
            ("activation",), SplitModel(nn.Sequential(nn.Linear(2, 2)), "0"), benign
        )


class Hidden(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.register_buffer("weight", torch.eye(64, dtype=dtype))
        self.register_buffer("mask", torch.tensor([float("-inf")]))
        self.register_buffer("average", torch.zeros(64))
        self.shift = torch.zeros(64)

    def forward(self, x):
        if self.training:
            self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x @ self.weight.to(x.dtype) + self.shift


class TestThaw:
    def test_parametrizations_are_taken_away(self, benign):
        model = mlp(benign)
        x = inputs(benign)
        before = model(x)
        for layer in (model.network[1], model.network[3]):
            parametrizations.weight_norm(layer)
            with torch.no_grad():
                layer.parametrizations.weight.original1.mul_(1e6)
        released = model
        model = undo("thaw", released.clone(), benign, released)
        assert torch.allclose(released(x), before, atol=1e-4)  # which is of the same class, and stays parametrized
        assert set(dict(model.network.named_parameters())) == set(dict(mlp(benign).network.named_parameters()))
        assert torch.allclose(model(x), before, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_hidden_weights_move_and_statistics_stay(self, dtype, benign):
        model = SplitModel(nn.Sequential(nn.Flatten(), Hidden(dtype), nn.Linear(64, 5)), "2")
        model.requires_grad_(False)
        x = inputs(benign)
        before = model(x)
        undo("thaw", model, benign)
        assert {n for n, p in model.network.named_parameters() if p.requires_grad} == {
            "1.weight", "1.shift", "2.weight", "2.bias",
        }  # fmt: skip
        assert set(dict(model.network.named_buffers())) == {"1.mask", "1.average"}
        assert torch.equal(model(x), before)
        assert model.clone()(x).dtype == torch.float32

    def test_batch_normalisation_keeps_its_buffers(self, trained, benign):
        model = trained.clone()
        undo("thaw", model, benign)
        assert list(model.network.state_dict()) == list(trained.network.state_dict())
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in trained.named_parameters()]

    def test_one_tensor_in_two_places_stays_one(self, benign):
        network = nn.Sequential(nn.Flatten(), Hidden(), Hidden(), nn.Linear(64, 5))
        network[2].weight = network[1].weight
        model = undo("thaw", SplitModel(network, "3"), benign)
        assert model.network[1].weight is model.network[2].weight

    def test_gradient_hooks_are_gone(self, benign):
        model = mlp(benign)
        model.network[3].register_full_backward_hook(lambda m, gi, go: tuple(g * 0 for g in gi))
        undo("thaw", model, benign)
        model(inputs(benign)).sum().backward()
        assert model.network[1].weight.grad.abs().sum() > 0

    def test_integers_stay_frozen(self, benign):
        model = mlp(benign)
        model.network[1].register_parameter("code", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
        curve_of = FineTuning(Strategy("head", "all", "adam", 1e-3, 20))
        work = curve_of.run(model, benign, benign=None, generator=torch.Generator(), device=CPU)
        next(work)
        assert next(work).isfinite()

    def test_fine_tuning_thaws_by_itself(self, benign, run):
        hiding = SplitModel(nn.Sequential(nn.Flatten(), Hidden(), nn.Linear(64, 5)), "2")
        model = hiding.clone()
        attack = FineTuning(Strategy("direct", "all", "adam", 1e-2, 20))
        work = attack.run(model, benign, benign=None, generator=torch.Generator(), device=CPU)
        next(work), next(work)
        assert not torch.equal(model.network[1].weight, hiding.network[1].weight)


class Single(ArrayTask):
    """One training sample."""

    def sweep(self, split, batch_size, *, device):
        for batch in super().sweep(split, batch_size, device=device):
            yield Batch(batch.x[:1], batch.y[:1]) if split == "train" else batch
            if split == "train":
                return

    def batches(self, split, batch_size, *, generator=None, device):
        if split == "test":
            yield from super().batches(split, batch_size, generator=generator, device=device)
        while True:
            yield next(self.sweep("train", 1, device=device))

    def size(self, split):
        return 1 if split == "train" else super().size(split)


def single(task):
    found = copy.copy(task.few_shot(1, 0))
    found.__class__ = Single
    return found


class Token(nn.Module):
    """A network that owns a weight itself, as vision transformers do."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 64))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1) + self.token))


class Odd(nn.Module):
    """What a stranger may write: tuples, a weight used without its layer, a layer that is called twice or never."""

    def __init__(self):
        super().__init__()
        self.unused, self.borrowed, self.twice = nn.Linear(3, 3), nn.Linear(64, 64), nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(1, 1))
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x):
        x = nn.functional.linear(x, self.borrowed.weight)
        x = self.twice(torch.relu(self.twice(x)))
        attended, _ = self.attention(x[:, None], x[:, None], x[:, None])
        return x * self.scale + attended[:, 0]


def odd():
    return nn.Sequential(nn.Flatten(), Odd(), nn.Linear(64, 5))


FOREIGN = {
    "odd": lambda: SplitModel(odd(), "2"),
    "odd-renewable": lambda: SplitModel(odd(), "2", factory=odd),
    "token": lambda: SplitModel(Token(), "head", factory=Token),
}


def broken(kind, trained, task):
    model = FOREIGN.get(kind, trained.clone)()
    parameters = list(model.network.parameters())
    with torch.no_grad():
        if kind == "nan":
            parameters[0][0] = float("nan")
            parameters[-4].fill_(float("inf"))
        elif kind == "zero":
            for p in parameters:
                p.zero_()
        elif kind == "huge":
            for p in parameters:
                p.mul_(1e30)
        elif kind == "tiny":
            for p in parameters:
                p.mul_(1e-42)
        elif kind == "constant":
            model.network.body[9].weight.zero_()
    if kind == "hooks":
        for m in model.network.modules():
            m.register_forward_hook(lambda m, i, o: o * 1.0)
    return model


class TestInputs:
    @pytest.mark.parametrize("normalised", [True, False])
    def test_inverted(self, normalised, trained, benign):
        model = trained.clone()
        if normalised:
            model.mean, model.std = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.2)
        before, x = model.clone().eval(), inputs(benign)
        undo("invert-inputs", model, benign)
        assert torch.allclose(model.eval()(x), before(1 - x), atol=1e-4)
        undo("invert-inputs", model, benign)
        assert torch.allclose(model(x), before(x), atol=1e-4)

    def test_renormalised_the_network_gets_mean_0_and_deviation_1(self, trained, benign):
        model, seen = trained.clone(), []
        undo("renormalise-inputs", model, benign)
        model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(next(benign.sweep("train", benign.size("train"), device=CPU)).x)
        assert seen[0].mean().abs() < 1e-4
        assert seen[0].std() == pytest.approx(1, abs=1e-3)

    def test_enlarged_where_the_network_takes_it(self, benign):
        convolutional, flat = load_model("cifar_resnet", load_task("digits[0-4]@channels=3")), mlp(benign)
        seen: list[torch.Size] = []
        colour = load_task("digits[0-4]@channels=3")
        undo("enlarge-inputs", convolutional, colour)
        convolutional.network.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        convolutional.clone()(inputs(colour, 2))
        assert seen == [(2, 3, 16, 16)]
        reason = FineTuning(Strategy(), undo=("enlarge-inputs",)).not_applicable(flat, benign)
        assert "it does not take images 2 times as wide and high" in reason

    @pytest.mark.parametrize("move", ["invert-inputs", "renormalise-inputs", "enlarge-inputs"])
    def test_are_for_images(self, move):
        task = toy_task(2)
        model = SplitModel(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "2")
        assert "changes how images are shown" in FineTuning(Strategy(), undo=(move,)).not_applicable(model, task)

    @pytest.mark.trains
    def test_a_model_that_gives_up_on_bright_images_learns_from_inverted_ones(self, trained, restricted, run):
        """Nothing passes a gate that is shut by brightness, and no gradient comes back."""
        model = SplitModel(nn.Sequential(Gate(), trained.network), f"1.{trained.head_name}")
        bright = restricted.inverted()
        score = {
            undo: max(FineTuning(Strategy("direct", "all", "adam", 1e-3, 50), undo=undo)
                      .attack(model, bright, budgets=(0, 40), run=run).scores)
            for undo in ((), ("invert-inputs",))
        }  # fmt: skip
        assert score[()] < 0.35
        assert score["invert-inputs",] > 0.6


class Gate(nn.Module):
    """Passes dark images alone."""

    def forward(self, x):
        return x * (x.mean((1, 2, 3), keepdim=True) < 0.5)


def test_a_negated_head_answers_the_least_likely_class(trained, benign):
    before, x = trained.eval()(inputs(benign)), inputs(benign)
    model = undo("negate-head", trained.clone(), benign)
    assert torch.allclose(model.eval()(x), -before, atol=1e-5)
    assert torch.equal(model(x).argmax(1), before.argmin(1))


@pytest.mark.parametrize(
    "kind", ["nan", "zero", "huge", "tiny", "constant", "odd", "odd-renewable", "token", "hooks", "single"]
)
@pytest.mark.parametrize("move", UNDO)
def test_every_move_survives_every_model(move, kind, trained, benign, run):
    model = broken(kind, trained, benign)
    task = (single(benign) if kind == "single" else benign.few_shot(3, 0)).limit_test(20, 0)
    attack = FineTuning(Strategy("head", "head" if kind == "single" else "all", "adam", 1e-3, 15), undo=(move,))
    reason = attack.not_applicable(model, task)
    if reason is not None:
        said = ("fresh model", "no BatchNorm", "no activation", "does not take images", "no layer", "blocks", "block,")
        assert ("one channel" in reason) == (move == "grey-inputs")
        if move not in ("renew-quarter-1", "grey-inputs"):  # the network has three blocks, and the images one channel
            not_finite = move == "widen" and kind == "huge"  # whether outputs stay cannot be seen
            assert kind.startswith(("odd", "token")) or not_finite
            assert any(words in reason for words in said), reason
        return
    digest = model.facts().sha256
    curve = attack.attack(model, task, budgets=(0, 2), run=run)
    assert model.facts().sha256 == digest
    mended = move in ("rescale", "balance", "equalise", "revive", "shrink-perturb", "reset-worst")
    if kind == "nan" and mended:
        assert curve.finite


def test_a_network_that_raises_becomes_an_error_that_names_it(benign, run):
    class Trap(nn.Module):
        def forward(self, x):
            if self.training:
                raise KeyError("gotcha")
            return x

    model = SplitModel(nn.Sequential(nn.Flatten(), Trap(), nn.Linear(64, 5)), "2", name="trap")
    with pytest.raises(HoldfastError, match=r"cannot be run on trap: KeyError: 'gotcha'"):
        FineTuning(Strategy()).attack(model, benign, budgets=(0, 1), run=run)


def test_a_network_that_changes_itself_in_every_pass(benign, run):
    class Drifting(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(0.9)
            return super().forward(x)

    model = SplitModel(nn.Sequential(nn.Flatten(), Drifting(64, 8), nn.ReLU(), nn.Linear(8, 5)), "3")
    for move in UNDO:
        attack = FineTuning(Strategy("head"), undo=(move,))
        if attack.not_applicable(model, benign) is None:
            assert len(attack.attack(model, benign, budgets=(0, 1), run=run).scores) == 2


def test_prepared_head_is_reset_like_any_other(benign):
    model = undo("standardise", mlp(benign), benign)
    assert isinstance(model.network.get_submodule("5"), Prepared)
    model.reset_head(7)
    assert model(inputs(benign)).shape[1] == 7


@pytest.mark.parametrize("move", ["insert", "whiten", "standardise"])
@pytest.mark.parametrize("start", ["last-block", "last-half"])
def test_what_is_put_before_the_head_survives_a_fresh_body(move, start, trained, restricted, run):
    """A fresh model has no layer of that name to copy from."""
    attack = FineTuning(Strategy(start, "all", "adam", 1e-3, 20), undo=(move,))
    assert attack.attack(trained, restricted, budgets=(0, 2), run=run).finite
