from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.tasks import load_task
from holdfast.training import OPTIMIZERS, Strategy, finetune, not_applicable, prepare, reshape_gradient

CPU = torch.device("cpu")


def steps(model, task, strategy, n, seed=0):
    training = finetune(model, task, strategy, generator=torch.Generator().manual_seed(seed), device=CPU)
    return [float(next(training)) for _ in range(n)]


def flat(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adamm"}, "did you mean 'adam"),
        ({"initialisation": "heads"}, "did you mean 'head'"),
        (
            {"scope": "everything"},
            "Known: all, cross-attention, embeddings, head, last-block, lora, lora-attention, norm",
        ),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"weight_decay": -1.0}, "at least 0"),
        ({"gradient": "signs"}, "did you mean .sign"),
        ({"rank": 0}, "rank is 0"),
        ({"schedule": "cosin"}, "did you mean .cosine"),
        ({"schedule": "cosine"}, "schedule_steps is 0; a cosine needs more steps than its warm-up of 0"),
        ({"schedule": "cosine", "schedule_steps": 5, "warmup": 5}, "more steps than its warm-up of 5"),
        ({"schedule_steps": 5}, "a constant schedule has no end"),
        ({"warmup": -1}, "warmup is -1"),
        ({"sharpness": float("inf")}, "sharpness is inf"),
    ],
)
def test_bad_strategies(change, message):
    with pytest.raises(HoldfastError, match=message):
        Strategy(**change)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_is_the_optimizers(model, benign, optimizer):
    """The loop against the same step written out with a plain torch optimizer."""
    strategy = Strategy("direct", "all", optimizer, 0.01, 20, 1e-3)
    twin = model.clone()
    prepare(model, strategy, benign)
    steps(model, benign, strategy, 1)
    plain = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=1e-3),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=1e-3),
        "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01, weight_decay=1e-3),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-3),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-3),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=1e-3),
    }[optimizer](twin.parameters())
    batch = next(benign.batches("train", 20, generator=torch.Generator().manual_seed(0), device=CPU))
    twin.train()
    nn.functional.cross_entropy(twin(batch.x), batch.y).backward()
    plain.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


class TestSchedules:
    def test_a_cosine_is_torchs(self):
        """The rates against torch's own scheduler, which counts from the end of the warm-up."""
        strategy = Strategy(learning_rate=0.3, schedule="cosine", schedule_steps=12, warmup=4)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        wanted = [0.3 * (k + 1) / 4 for k in range(4)]
        for _ in range(9):
            wanted.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            cosine.step()
        assert [strategy.rate(k) for k in range(13)] == pytest.approx(wanted, abs=1e-12)
        assert strategy.rate(12) == strategy.rate(1000) == 0

    def test_a_constant_rate_may_have_a_warm_up(self):
        strategy = Strategy(learning_rate=0.3, warmup=3)
        assert [strategy.rate(k) for k in (0, 1, 2, 3, 99)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])

    def test_steps_are_as_long_as_the_schedule_says(self, model, benign):
        strategy = Strategy("direct", "all", "sgd", 0.2, 20, gradient="normalised", schedule="cosine",
                            schedule_steps=5, warmup=2)  # fmt: skip
        training = finetune(model, benign, strategy, generator=torch.Generator().manual_seed(0), device=CPU)
        places = [flat(model)]
        for _ in range(7):
            next(training)
            places.append(flat(model))
        lengths = [float((b - a).norm()) for a, b in pairwise(places)]
        assert lengths == pytest.approx([strategy.rate(k) for k in range(7)], rel=1e-3, abs=1e-9)
        assert lengths[5:] == [0, 0]  # the attack is over

    def test_settings_name_it_only_if_there_is_one(self):
        assert not {"schedule", "schedule_steps", "warmup"} & set(Strategy().settings())
        settings = Strategy(schedule="cosine", schedule_steps=9).settings()
        assert Strategy(**settings) == Strategy(schedule="cosine", schedule_steps=9)
        assert (settings["schedule"], settings["schedule_steps"]) == ("cosine", 9)


def test_head_scope_freezes_the_body_and_its_statistics(model, benign):
    strategy = Strategy("head", "head", "adam", 0.01, 20)
    with torch.random.fork_rng():
        moved = prepare(model, strategy, benign)
    assert {id(p) for p in moved} == {id(p) for p in model.head.parameters()}
    before = {n: v.clone() for n, v in model.network.state_dict().items()}
    steps(model, benign, strategy, 5)
    changed = {n for n, v in model.network.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"head.weight", "head.bias"}


def test_all_scope_moves_what_was_frozen(model, benign):
    """An adversary owns the weights: freezing protects nothing."""
    model.requires_grad_(False)
    assert len(prepare(model, Strategy(), benign)) == len(list(model.parameters()))


def test_head_start_has_one_output_a_class(model):
    task = load_task("digits")
    assert not_applicable(Strategy("head"), model, task) is None
    prepare(model, Strategy("head"), task)
    assert model.num_outputs == 10


def test_direct_start_needs_enough_outputs(model):
    task = load_task("digits")
    assert "5 outputs, and the task has 10 classes" in str(not_applicable(Strategy("direct"), model, task))
    with pytest.raises(HoldfastError, match="cannot be run on 'digits'"):
        prepare(model, Strategy("direct"), task)
    assert not_applicable(Strategy("direct"), model, load_task("digits[0-2]")) is None


def test_a_batch_of_one_cannot_train_batch_normalisation(benign):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    with pytest.raises(HoldfastError, match=r"BatchNorm cannot be trained on one; give a batch size of at least 2"):
        steps(SplitModel(network, "3"), benign, Strategy(batch_size=1), 1)
    assert len(steps(SplitModel(network, "3"), benign, Strategy(batch_size=2), 1)) == 1


def test_scoring_in_between_does_not_change_the_training(model, benign):
    twin = model.clone()
    plain = steps(model, benign, Strategy(), 4)
    training = finetune(twin, benign, Strategy(), generator=torch.Generator().manual_seed(0), device=CPU)
    scored = []
    for _ in range(4):
        scored.append(float(next(training)))
        benign.score(twin)
        twin.eval()
    assert plain == scored


def test_it_learns(model, benign):
    losses = steps(model, benign, Strategy("direct", "all", "adam", 2e-3, 50), 60)
    assert losses[-1] < 0.2 * losses[0]
    assert benign.score(model) > 0.9


def test_dropout_is_on_in_training_and_off_in_scores(benign):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 5))
    model = SplitModel(network, "3")
    assert benign.score(model) == benign.score(model)
    steps(model, benign, Strategy(), 1)
    x = next(benign.batches("test", 8, device=CPU)).x
    assert not torch.equal(model(x), model(x))


def test_real_pretraining_is_an_advantage(data_dir):
    benign = load_task("cifar10", data_dir=data_dir)
    restricted = load_task("cifar100_objects", data_dir=data_dir).limit_test(200, 0).few_shot(20, 0)
    spec = ModelSpec(name="cifar_resnet", weights="weights/cifar10_resnet20.safetensors")
    original = load_model(spec, benign, data_dir=data_dir)
    strategy, scores = Strategy("head", "all", "adam", 1e-3, 50), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for model in (original.clone(), original.fresh()):
            prepare(model, strategy, restricted)
            steps(model, restricted, strategy, 20)
            scores.append(restricted.score(model))
    assert scores[0] > scores[1] + 0.1


class TestBlocks:
    """What "the last block" means, on architectures that do not say it themselves."""

    @pytest.mark.parametrize(
        ("name", "shape", "expected"),
        [
            ("mlp", (1, 8, 8), ["body.1", "body.3"]),
            ("cnn", (1, 8, 8), ["body.0", "body.4", "body.9"]),
            ("cifar_resnet", (3, 8, 8), ["conv1"] + [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]),
            ("timm:resnet18", (3, 32, 32), ["conv1"] + [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]),
            ("timm:vit_tiny_patch16_224", (3, 224, 224), ["patch_embed"] + [f"blocks.{i}" for i in range(12)]),
        ],
    )
    def test_of_known_architectures(self, name, shape, expected):
        from holdfast.models.family import family_of

        spec = ModelSpec(name=name)
        built = family_of(spec.name).build(spec, shape, 4, None)
        network, head = built.network, built.head
        blocks = SplitModel(network, head).blocks()
        weighted = [next(n for n, m in block if any(p.dim() > 1 for p in m.parameters())) for block in blocks]
        assert weighted == expected
        inside = [n for block in blocks for n, _ in block]
        assert len(set(inside)) == len(inside)
        assert not any(f"{head}.".startswith(f"{n}.") for n in inside)

    def test_a_wrapper_is_no_block(self):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Module()
                self.encoder.first = nn.Linear(4, 4)
                self.encoder.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 1, 8) for _ in range(3)])
                self.classifier = nn.Linear(4, 2)

        blocks = SplitModel(Wrapped(), "classifier").blocks()
        assert [b[0][0] for b in blocks] == ["encoder.first", *(f"encoder.layers.{i}" for i in range(3))]

    def test_an_extractor_is_of_the_last_block(self, model):
        model.insert_extractor(torch.eye(64, dtype=torch.float64) * 2)
        assert [n for n, _ in model.blocks()[-1]] == ["body.9", "body.10", "head.0"]

    def test_a_linear_model_has_none(self, benign):
        linear = SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "1")
        assert linear.blocks() == []
        assert "no last block" in not_applicable(Strategy("last-block"), linear, benign)
        assert "no last block" in not_applicable(Strategy("head", "last-block"), linear, benign)
        assert "takes adapters" in not_applicable(Strategy("head", "lora"), linear, benign)


class TestStarts:
    @pytest.mark.parametrize(("start", "anew"), [("last-block", 1), ("last-half", 2)])
    def test_the_last_blocks_are_the_reference(self, trained, benign, start, anew):
        model, reference = trained.clone(), trained.fresh()
        before = {n: v.clone() for n, v in model.network.state_dict().items()}
        prepare(model, Strategy(start), benign, reference)
        fresh, now = reference.network.state_dict(), model.network.state_dict()
        layers = {n: i for i, block in enumerate(model.blocks()) for n, _ in block}
        for name, value in now.items():
            layer = name.rpartition(".")[0]
            if layer in layers:
                expected = fresh if layers[layer] >= 3 - anew else before
                assert torch.equal(value, expected[name]), name
        assert not torch.equal(now["head.weight"], before["head.weight"])

    def test_shrunk_and_perturbed_every_weight_is_half_of_the_reference(self, trained, benign):
        model, reference = trained.clone(), trained.fresh()
        prepare(model, Strategy("shrink-perturb"), benign, reference)
        own, before, fresh = (dict(m.network.named_parameters()) for m in (model, trained, reference))
        for name, weight in own.items():
            if not name.startswith(f"{model.head_name}."):
                half = weight.dim() > 1
                assert torch.equal(weight, 0.5 * before[name] + 0.5 * fresh[name] if half else before[name])

    def test_an_extractor_starts_as_the_identity(self, model, benign):
        model.insert_extractor(torch.eye(64, dtype=torch.float64) * 2)
        prepare(model, Strategy("last-block"), benign)
        assert torch.equal(model.extractor_layer().weight, torch.eye(64, dtype=torch.float64))

    def test_says_when_it_cannot(self, benign):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(64, 8))

            def forward(self, x):
                return x @ self.weight

        single = SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 5)), "2")
        assert "no last half" in not_applicable(Strategy("last-half"), single, benign)
        odd = SplitModel(nn.Sequential(nn.Flatten(), Odd(), nn.Linear(8, 5)), "2")
        assert "cannot be initialised anew" in not_applicable(Strategy("last-block"), odd, benign)
        wrong = SplitModel(odd.network, "2", factory=lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 8)))
        with pytest.raises(HoldfastError, match=r"no tensor of that name and shape"):
            wrong.reinitialise(["1"], single)


class TestScopes:
    def changed(self, model, task, strategy, n=3):
        with torch.random.fork_rng():
            prepare(model, strategy, task)
        before = {n: v.clone() for n, v in model.network.state_dict().items()}
        steps(model, task, strategy, n)
        return {n for n, v in model.network.state_dict().items() if not torch.equal(v, before[n])}

    def test_last_block(self, trained, benign):
        changed = self.changed(trained.clone(), benign, Strategy("head", "last-block", "adam", 0.01, 20))
        assert changed == {"body.9.weight", "body.9.bias", "head.weight", "head.bias"}

    def test_norm(self, trained, benign):
        changed = self.changed(trained.clone(), benign, Strategy("direct", "norm", "adam", 0.01, 20))
        assert {n for n in changed if "running" not in n and "tracked" not in n} == {
            "body.1.weight", "body.1.bias", "body.5.weight", "body.5.bias", "head.weight", "head.bias",
        }  # fmt: skip
        plain = load_model(ModelSpec(name="cnn", options={"norm": "none"}), benign)
        assert "no normalisation layer" in not_applicable(Strategy(scope="norm"), plain, benign)

    def test_embeddings(self, trained, benign):
        class Reader(nn.Module):
            """Reads pixels as tokens."""

            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(17, 4)
                self.norm = nn.LayerNorm(4)
                self.mix = nn.Linear(4, 8)

            def forward(self, x):
                return self.mix(self.norm(self.embed((x * 16).long().flatten(1)))).mean(1)

        model = SplitModel(nn.Sequential(Reader(), nn.Linear(8, 5)), "1")
        changed = self.changed(model, benign, Strategy("direct", "embeddings", "adam", 0.01, 20))
        assert changed == {"0.embed.weight", "0.norm.weight", "0.norm.bias", "1.weight", "1.bias"}
        norms = self.changed(trained.clone(), benign, Strategy("direct", "embeddings", "adam", 0.01, 20))
        assert norms == self.changed(trained.clone(), benign, Strategy("direct", "norm", "adam", 0.01, 20))
        plain = load_model(ModelSpec(name="cnn", options={"norm": "none"}), benign)
        assert "no embedding layer, and no norm" in not_applicable(Strategy(scope="embeddings"), plain, benign)

    @pytest.mark.parametrize("name", ["cnn", "mlp"])
    def test_adapters_start_as_nothing_and_are_all_that_moves(self, benign, name):
        model = load_model(name, benign)
        x = next(benign.batches("test", 8, device=CPU)).x
        before, inside = model.eval()(x), model.features(x)
        changed = self.changed(model.clone(), benign, Strategy("direct", "lora", "adam", 0.01, 20, rank=2), n=0)
        assert not changed
        adapted = model.clone()
        moved = prepare(adapted, Strategy("direct", "lora", rank=2), benign)
        assert torch.equal(adapted.eval()(x), before)
        assert torch.equal(adapted.features(x), inside)
        assert {p.shape[0] for p in moved if p.dim() == 2} >= {2}
        losses = steps(adapted, benign, Strategy("direct", "lora", "adam", 0.01, 50, rank=2), 40)
        assert losses[-1] < 0.7 * losses[0]
        own = dict(model.network.named_parameters())
        for key, value in adapted.network.named_parameters():
            if "lora_" not in key and not key.startswith("head"):
                assert torch.equal(value, own[key.replace(".base_layer", "")]), key

    def test_adapters_only_where_the_right_layer_ends_alike(self, benign):
        """Layer "0" of the body is adapted, and not the block whose name ends in 0."""
        network = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 8))), nn.Linear(8, 5))
        model = SplitModel(network, "1")
        prepare(model, Strategy("head", "lora"), benign)
        assert {n for n, _ in network.named_parameters() if "lora" in n} == {
            "0.1.0.lora_A.default.weight", "0.1.0.lora_B.default.weight",
        }  # fmt: skip

    def test_adapters_leave_out_what_they_cannot_serve(self, benign):
        body = nn.Sequential(nn.Conv2d(1, 4, 3, dilation=2), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten())
        model = SplitModel(nn.Sequential(body, nn.Linear(64, 5)), "1")
        assert "takes adapters" in not_applicable(Strategy("head", "lora"), model, benign)


class TestGradients:
    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e20, 1e30])
    def test_normalised_is_of_length_one_at_every_scale(self, scale):
        parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4, dtype=torch.float64))]
        direction = [torch.randn(3, 2), torch.randn(4, dtype=torch.float64)]
        for p, d in zip(parameters, direction, strict=True):
            p.grad = d * scale
        reshape_gradient(parameters, "normalised")
        length = sum(float(p.grad.double().square().sum()) for p in parameters)
        assert length == pytest.approx(1, rel=1e-5)
        size = sum(float(d.double().square().sum()) for d in direction) ** 0.5
        assert torch.allclose(parameters[0].grad * size, direction[0], rtol=1e-4)

    def test_what_is_not_finite(self):
        p = nn.Parameter(torch.zeros(3))
        for gradient, expected in (("normalised", [0.0, 1.0, 0.0]), ("sign", [0.0, 1.0, -1.0])):
            p.grad = torch.tensor([float("nan"), float("inf"), -1.0])
            reshape_gradient([p], gradient)
            assert p.grad.tolist() == pytest.approx(expected, abs=1e-6)

    def test_nothing_to_scale(self):
        p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        p.grad = torch.zeros(3)
        for gradient in ("normalised", "sign", "raw"):
            reshape_gradient([p, q], gradient)
            assert p.grad.tolist() == [0, 0, 0]

    def test_a_step_with_sgd_is_as_long_as_the_rate(self, model, benign):
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        steps(model, benign, Strategy("direct", "all", "sgd", 0.25, 20, gradient="normalised"), 1)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-4)
