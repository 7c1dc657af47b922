from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.finetune import OPTIMIZERS, Strategy, finetune, not_applicable, prepare
from holdfast.models import SplitModel, load_model
from holdfast.tasks import load_task

CPU = torch.device("cpu")


def steps(model, task, strategy, n, seed=0):
    training = finetune(model, task, strategy, generator=torch.Generator().manual_seed(seed), device=CPU)
    return [float(next(training)) for _ in range(n)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adamm"}, "did you mean 'adam"),
        ({"initialisation": "heads"}, "did you mean 'head'"),
        ({"scope": "everything"}, "Known: all, head"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"weight_decay": -1.0}, "at least 0"),
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
    }[optimizer](twin.parameters())
    batch = next(benign.batches("train", 20, generator=torch.Generator().manual_seed(0), device=CPU))
    twin.train()
    nn.functional.cross_entropy(twin(batch.x), batch.y).backward()
    plain.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


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
    from holdfast.models import ModelSpec

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
