"""Moves by their mechanisms: what they change in the weights, the layers and the inputs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import islice, pairwise

import pytest
import torch
from torch import nn

from conftest import toy_task
from holdfast.adversaries import UNDO, DirectionalAblation, FineTuning, Probe, Unlabelled
from holdfast.adversaries.augmentation import Augmentation
from holdfast.adversaries.directional_ablation import ablate_features
from holdfast.adversaries.distillation import distil, start_anew
from holdfast.adversaries.newton import descend_by_newton
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.tasks import ArrayTask, RegressionTask, load_task
from holdfast.training import Strategy

CPU = torch.device("cpu")
S = Strategy("head", "all", "adam", 2e-3, 20)


def undo(move, model, task, reference=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNDO[move](model, reference or model.fresh(), task, torch.Generator().manual_seed(0), CPU)
    return model


def inputs(task, n=100):
    return next(task.sweep("train", n, device=CPU)).x


def matrices(model):
    return {n: p for n, p in model.network.named_parameters() if p.dim() > 1}


class TestCompression:
    def test_rounding_to_8_bits(self, trained, benign):
        model = undo("round-int8", trained.clone(), benign)
        for name, weight in matrices(model).items():
            before = matrices(trained)[name]
            step = before.abs().flatten(1).amax(1) / 127
            levels = weight.flatten(1) / step[:, None]
            assert torch.allclose(levels, levels.round(), atol=1e-3), name
            assert ((weight - before).flatten(1).abs() <= 0.5001 * step[:, None]).all(), name

    def test_rounding_to_bfloat16(self, trained, benign):
        model = undo("round-bf16", trained.clone(), benign)
        for own, before in zip(model.network.parameters(), trained.network.parameters(), strict=True):
            assert torch.equal(own, before.to(torch.bfloat16).float())

    def test_pruning_zeroes_the_smaller_half_and_leaves_the_others(self, trained, benign):
        model = undo("prune", trained.clone(), benign)
        for name, weight in matrices(model).items():
            before, gone = matrices(trained)[name], weight == 0
            assert gone.sum() == weight.numel() // 2, name
            assert before[gone].abs().max() <= before[~gone].abs().min(), name
            assert torch.equal(weight[~gone], before[~gone]), name

    def test_low_rank_is_the_best_approximation(self, trained, benign):
        model = undo("low-rank", trained.clone(), benign)
        for name, weight in matrices(model).items():
            before = matrices(trained)[name].detach().flatten(1).double()
            kept = max(1, round(min(before.shape) / 2))
            sigma, own = torch.linalg.svdvals(before), weight.detach().flatten(1).double()
            assert torch.linalg.matrix_rank(own, atol=1e-4 * sigma[0]) <= kept, name
            assert torch.allclose((own - before).norm(), sigma[kept:].norm(), rtol=1e-3), name

    def test_a_shared_matrix_is_compressed_once(self, benign):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 5))
        network[3].weight = network[1].weight
        undo("prune", model := SplitModel(network, "4"), benign)
        assert (model.network[1].weight == 0).double().mean() == 0.5


class TestWiden:
    @pytest.mark.parametrize("name", ["cnn", "mlp", "cifar_resnet", "cifar_vit"])
    def test_outputs_stay_and_new_units_learn(self, name):
        task = load_task("digits[0-4]@channels=3,image_size=32" if name.startswith("cifar") else "digits[0-4]")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, reference = load_model(name, task).eval(), load_model(name, task)
        x, sizes = inputs(task, 8), {n: p.shape for n, p in model.named_parameters()}
        before = model(x)
        undo("widen", model, task, reference)
        assert torch.allclose(model(x), before, atol=1e-5, rtol=1e-4)
        wider = [n for n, p in model.named_parameters() if p.shape != sizes[n]]
        assert len(wider) > 2
        assert [p.shape for p in model.parameters()] == [p.shape for p in reference.parameters()]
        model.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_old_units_are_read_as_before_and_new_ones_by_zeros(self, benign):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = load_model("mlp", benign)
        first, second = model.network.body[1].weight.clone(), model.network.body[3].weight.clone()
        undo("widen", model, benign)
        units, more = len(first), len(first) // 2
        assert torch.equal(model.network.body[1].weight[:units], first)
        wide = model.network.body[3].weight
        assert wide.shape == (3 * len(second) // 2, units + more)
        assert torch.equal(wide[: len(second), :units], second)
        assert not wide[: len(second), units:].any()
        assert wide[len(second) :, units:].all()
        assert (model.head.in_features, model.network.body[3].in_features) == (wide.shape[0], wide.shape[1])

    def test_what_reads_a_layer_elsewhere_is_left(self, benign):
        class Skipping(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x):
                y = self.first(x)
                return y + self.second(torch.relu(y))

        def build():
            return nn.Sequential(nn.Flatten(), Skipping(), nn.Linear(64, 5))

        model = SplitModel(build(), "2", factory=build)
        before = {n: p.clone() for n, p in model.named_parameters()}
        undo("widen", model, benign)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in before.items()}
        assert model.network[1].first.out_features == 64

    @pytest.mark.parametrize("start", ["direct", "head", "last-block", "last-half", "shrink-perturb"])
    def test_composes_with_every_start(self, start, trained, benign, restricted, run):
        attack = FineTuning(Strategy(start, "all", "adam", 2e-3, 20), undo=("widen",))
        curve = attack.attack(trained, restricted, budgets=(0, 3), run=run, benign=benign, score_benign=True)
        assert curve.finite
        assert curve.benign_after is not None


class TestInsertedLayers:
    def test_are_the_identity_and_trained_whatever_the_scope(self, trained, benign, run):
        model = trained.clone().eval()
        x, before = inputs(benign), trained.eval()(inputs(benign))
        undo("insert-between", model, benign)
        assert torch.equal(model(x), before)
        assert torch.equal(model.clone()(x), before)
        attack = FineTuning(Strategy("head", "head", "sgd", 0.1, 20), undo=("insert-between",))
        work = attack.run(model := trained.clone(), benign, benign=None, generator=torch.Generator(), device=CPU)
        list(islice(work, 2))
        moved = {n.rpartition(".")[2] for n, p in model.network.named_parameters() if p.requires_grad}
        assert moved == {"inserted_weight", "inserted_bias", "weight", "bias"}
        layer = model.network.body[4]
        assert not layer.weight.requires_grad
        assert not torch.equal(layer.inserted_weight, torch.eye(len(layer.inserted_weight)))

    def test_of_a_denoiser(self, denoiser, digit_images):
        model, x = denoiser.clone().eval(), inputs(digit_images[0], 4)
        undo("insert-between", model, digit_images[0])
        assert torch.allclose(model(x), denoiser.eval()(x), atol=1e-5)
        assert any(n.endswith("inserted_weight") for n, _ in model.named_parameters())

    def test_of_a_language_model(self):
        task = load_task("made-up-facts@tokenizer=bytes,length=64")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = load_model("llama", task).eval()
        x, before = inputs(task, 4), model(inputs(task, 4))
        undo("insert-between", model, task)
        assert torch.allclose(model(x), before, atol=1e-5)
        assert any(n.endswith("inserted_weight") for n, _ in model.named_parameters())


class TestRenewedBlocks:
    def test_quarters_are_all_blocks_once_each(self, trained, benign):
        reference = trained.fresh()
        changed = []
        for number in range(1, 5):
            move = UNDO[f"renew-quarter-{number}"]
            if move.cannot(trained, benign) is None:
                model = undo(move.name, trained.clone(), benign, reference)
                changed += [n for n, p in matrices(model).items() if not torch.equal(p, matrices(trained)[n])]
        assert sorted(changed) == sorted(n for n in matrices(trained) if n != "head.weight")
        assert "none of them is in quarter 1" in UNDO["renew-quarter-1"].cannot(trained, benign)

    def test_the_stillest_block(self, benign):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = load_model(ModelSpec(name="mlp", options={"depth": 5}), benign)
        with torch.no_grad():
            model.network.body[5].weight *= 30  # large weights with usual gradients hardly move
            model.network.body[7].weight /= 30
        before = {n: p.clone() for n, p in matrices(model).items()}
        undo("renew-still", model, benign)
        changed = {n for n, p in matrices(model).items() if not torch.equal(p, before[n])}
        assert "body.5.weight" in changed
        assert len(changed) == 2


class TestInputs:
    @pytest.mark.parametrize(
        ("move", "shown"),
        [
            ("mirror-inputs", lambda x: x.flip(-1)),
            ("grey-inputs", lambda x: x.mean(1, keepdim=True).expand_as(x)),
            (
                "stretch-inputs",
                lambda x: (x - x.amin((1, 2, 3), True)) / (x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True)),
            ),
        ],
    )
    def test_the_network_sees_other_images(self, move, shown):
        task = load_task("digits[0-4]@channels=3,image_size=32")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = load_model("cifar_resnet", task).eval()
        x = inputs(task, 8) * torch.tensor([0.9, 0.5, 0.3]).view(3, 1, 1) + 0.05
        changed = undo(move, model.clone(), task)
        assert torch.allclose(changed(x), model(shown(x)), atol=1e-5)
        assert torch.allclose(changed.clone().features(x), model.features(shown(x)), atol=1e-5)

    def test_a_constant_image_stays_finite(self, trained, benign):
        model = undo("stretch-inputs", trained.clone(), benign).eval()
        assert model(torch.full((2, 1, 8, 8), 0.7)).isfinite().all()

    def test_say_where_there_is_nothing_to_show(self, trained, benign):
        task = toy_task(2)
        model = SplitModel(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "2")
        for move in ("mirror-inputs", "grey-inputs", "stretch-inputs"):
            assert "has none to classify" in FineTuning(S, undo=(move,)).not_applicable(model, task)
        assert "one channel" in FineTuning(S, undo=("grey-inputs",)).not_applicable(trained, benign)
        assert "it augments images" in FineTuning(S, augment="rand-m5-n1").not_applicable(model, task)


class TestDistillation:
    def test_a_fresh_network_gets_the_features(self, trained, benign, restricted):
        model, head = trained.clone(), copy.deepcopy(trained.head)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            teacher = start_anew(model)
            assert not torch.equal(model.network.body[0].weight, trained.network.body[0].weight)
            assert torch.equal(model.head.weight, head.weight)
            generator = torch.Generator().manual_seed(0)
            work = distil(model, teacher, (benign, restricted), batch_size=50, generator=generator, device=CPU)
            losses = [float(loss) for loss in islice(work, 150)]
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
        assert benign.score(model) > 0.8  # through the released head
        for own, before in zip(teacher.parameters(), trained.parameters(), strict=True):
            assert torch.equal(own, before)

    def test_its_steps_are_paid_for(self, trained, benign, restricted, run):
        attack = FineTuning(S, distil_first=15)
        curve = attack.attack(trained, restricted, budgets=(0, 15, 75), run=run, benign=benign)
        assert curve.scores[1] < 0.45
        assert curve.scores[2] > 0.6

    def test_says_why_not(self, benign):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.eye(64))

            def forward(self, x):
                return x @ self.weight

        model = SplitModel(nn.Sequential(nn.Flatten(), Own(), nn.Linear(64, 5)), "2")
        assert "a fresh network should learn its features" in FineTuning(S, distil_first=3).not_applicable(
            model, benign
        )


class TestBenignFloor:
    def test_steps_below_it_are_taken_back(self, trained, benign, restricted):
        """At a rate that destroys the model, every step is taken back, and the attack ends with the weights it had."""
        attack = FineTuning(Strategy("head", "all", "sgd", 1e4, 20), benign_floor=0.9)
        model = trained.clone()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            work = attack.run(model, restricted, benign=benign, generator=generator, device=CPU)
            next(work)
            before = copy.deepcopy(model.state_dict())
            list(islice(work, 12))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("optimizer", ["adagrad", "adam", "momentum"])
    def test_what_the_model_keeps(self, optimizer, trained, benign, restricted, run):
        rate = {"adagrad": 0.1, "adam": 0.03, "momentum": 0.1}[optimizer]
        strategy = Strategy("head", "all", optimizer, rate, 20)
        plain, held = (
            FineTuning(strategy, **more).attack(
                trained, restricted, budgets=(0, 40), run=run, benign=benign, score_benign=True
            )
            for more in ({}, {"benign_floor": 0.9})
        )
        assert held.benign_after > 0.75
        assert held.benign_after > plain.benign_after - 0.02


class TestAugmentation:
    def test_depends_on_its_generator_alone(self):
        x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        made = [Augmentation("rand-m9-n2", torch.Generator().manual_seed(seed))(x) for seed in (0, 0, 1)]
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])
        assert not torch.equal(made[0], x)
        assert made[0].min() >= 0
        assert made[0].max() <= 1


class TestAblation:
    def test_restricted_inputs_look_like_benign_ones_on_average(self, trained, benign, restricted):
        model, inside, outside = trained.clone().eval(), inputs(benign), inputs(restricted)
        gap = (model.features(outside).mean(0) - model.features(inside).mean(0)).norm()
        ablate_features(model, outside, inside)
        assert (model.features(outside).mean(0) - model.features(inside).mean(0)).norm() < 1e-4 * gap
        assert benign.score(model) > 0.6

    def test_what_comes_behind_the_head_is_left(self, trained, benign, restricted, run):
        """Modules behind the head belong to the last block, and their outputs have as many classes as the head."""
        own, adversary = trained.network, DirectionalAblation(S, depth=1.0)
        layers = OrderedDict(body=own.body, head=own.head, behind=nn.Identity())
        model = SplitModel(nn.Sequential(layers), "head")
        curves = [
            adversary.attack(m, restricted.few_shot(4, 0), budgets=(0, 2), run=run, benign=benign)
            for m in (model, SplitModel(nn.Sequential(OrderedDict(body=own.body, head=own.head)), "head"))
        ]
        assert curves[0].losses == curves[1].losses

    def test_of_a_denoiser(self, denoiser, digit_images, run):
        benign, restricted = (task.few_shot(10, 0) for task in digit_images)
        attack = DirectionalAblation(Strategy("direct", "all", "adam", 1e-3, 10), depth=1.0)
        assert attack.not_applicable(denoiser, restricted) is None
        assert attack.attack(denoiser, restricted, budgets=(0, 2), run=run, benign=benign).finite


class TestUnlabelled:
    def test_uses_the_labels_of_a_part(self, trained, restricted, monkeypatch):
        shots = []
        few = type(restricted).few_shot
        monkeypatch.setattr(type(restricted), "few_shot", lambda self, n, seed: shots.append(n) or few(self, n, seed))
        model = trained.clone()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            work = Unlabelled(S).run(
                model, restricted, benign=None, generator=torch.Generator().manual_seed(0), device=CPU
            )
            assert all(loss.isfinite() for loss in islice(work, 3))
        assert shots == [round(restricted.size("train") / 50)]

    def test_is_for_classes(self):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).numpy()
        task = RegressionTask("values", x, x[:, 0], x, x[:, 0])
        model = SplitModel(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), "2")
        assert "does not have" in Unlabelled(S).not_applicable(model, task)


class TestNewton:
    def test_finds_the_minimum_of_a_badly_conditioned_logistic_loss(self):
        generator = torch.Generator().manual_seed(0)
        x = (
            torch.randn(200, 5, generator=generator, dtype=torch.float64)
            @ torch.diag(10.0 ** torch.arange(5.0)).double()
        )
        y = (x[:, 0] + torch.randn(200, generator=generator, dtype=torch.float64) > 0).long()

        def loss(w):
            return nn.functional.cross_entropy(x @ w, y) + 1e-9 * w.square().sum()

        steps = descend_by_newton(loss, torch.zeros(5, 2, dtype=torch.float64))
        values = [float(value) for _, value in islice(steps, 30)]
        assert all(b <= a + 1e-15 for a, b in pairwise(values))
        point = next(steps)[0].requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(point), point)
        assert (gradient.abs() / 10.0 ** torch.arange(5.0)[:, None]).max() < 1e-3

    def test_of_constant_features_is_the_bias_alone(self, trained, restricted, run):
        model = trained.clone()
        with torch.no_grad():
            for parameter in model.network.body.parameters():
                parameter.zero_()
        curve = Probe("newton").attack(model, restricted.few_shot(4, 0), budgets=(0, 2), run=run)
        assert curve.finite
        assert curve.scores[1] < 0.3


def _table(values):
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)).numpy()
    y = x[:, 0] if values else (x[:, 0] > 0).astype(int)
    kind = RegressionTask if values else ArrayTask
    task = kind("table", x[:40], y[:40], x[40:], y[40:])

    def build():
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1 + (not values))
        )

    return task, SplitModel(build(), "5", factory=build)


@pytest.fixture(scope="module")
def kinds(denoiser, digit_images):
    """A task and a model of every kind but images and audio."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        phrases = load_task("phrases@tokenizer=bytes,length=24").few_shot(6, 0).limit_test(4, 0)
        return {
            "classes of a table": _table(False),
            "values of a table": _table(True),
            "denoising": (digit_images[0].few_shot(6, 0).limit_test(4, 0), denoiser),
            "next token": (phrases, load_model("llama", phrases)),
        }


NOT_FOR = {
    "invert-inputs", "renormalise-inputs", "enlarge-inputs", "mirror-inputs", "grey-inputs", "stretch-inputs",
    "recalibrate", "fold", "activation", "renew-quarter-1", "renew-quarter-3",
}  # fmt: skip
"""Moves for images, and those that need a BatchNorm, an activation module, or four blocks."""


@pytest.mark.parametrize("kind", ["classes of a table", "values of a table", "denoising", "next token"])
@pytest.mark.parametrize("move", UNDO)
def test_every_move_is_for_every_kind_of_task_or_says_why_not(move, kind, kinds, run):
    task, model = kinds[kind]
    attack = FineTuning(Strategy("direct", "all", "adam", 1e-3, 8), undo=(move,))
    reason = attack.not_applicable(model, task)
    if reason is None:
        assert attack.attack(model, task, budgets=(0, 1), run=run).finite
        return
    gated = move == "widen" and kind == "next token"  # a llama multiplies the outputs of two layers
    features = move in ("insert", "whiten", "standardise") and kind in ("denoising", "next token")
    assert move in NOT_FOR or gated or features, reason
