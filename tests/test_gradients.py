"""Steps that are not along the plain gradient: scaled by layers, orthogonal, sharpness-aware, with restarts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.training import Strategy, prepare, reshape_gradient
from test_training import CPU, steps


class TestReshaped:
    @pytest.mark.parametrize("gradient", ["layerwise", "orthogonal"])
    def test_every_tensor_moves_by_the_same_share(self, model, benign, gradient):
        """Whatever the scales of the layers are: here they are eight decades apart."""
        prepare(model, Strategy("head"), benign)
        with torch.no_grad():
            model.network.body[0].weight *= 1e4
            model.network.body[4].weight *= 1e-4
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        steps(model, benign, Strategy("head", "all", "sgd", 1e-2, 20, gradient=gradient), 1)
        for name, p in model.named_parameters():
            if p.dim() > 1:
                share = (p - before[name]).norm() / before[name].norm()
                assert float(share.detach()) == pytest.approx(1e-2, rel=1e-3), name
            else:
                assert (p.detach() - before[name]).norm() <= 1.001e-2 * max(
                    before[name].norm(), 0.01 * p.numel() ** 0.5
                ), name

    def test_orthogonal_gradients_have_even_singular_values(self):
        weight = nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
        weight.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)) @ torch.diag(
            torch.logspace(0, -2, 8)
        )
        u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
        reshape_gradient([weight], "orthogonal")
        sigma = torch.linalg.svdvals(weight.grad)
        assert sigma[0] < 2.5 * sigma[-1]
        assert weight.grad.norm().item() == pytest.approx(weight.detach().norm().item(), rel=1e-5)
        assert nn.functional.cosine_similarity(weight.grad.flatten(), (u @ v).flatten(), 0) > 0.95

    @pytest.mark.parametrize("gradient", ["layerwise", "orthogonal"])
    def test_nothing_moves_by_a_gradient_of_zeros(self, gradient):
        weight = nn.Parameter(torch.ones(3, 3, 3, 3).to(memory_format=torch.channels_last))
        weight.grad = torch.zeros_like(weight)
        reshape_gradient([weight], gradient)
        assert not weight.grad.any()


def test_sharpness_aware_steps_are_written_out(model, benign):
    """One step of descent by the gradient that is found a radius up the gradient."""
    model.eval()
    plain = Strategy("direct", "all", "sgd", 1e-2, 20)
    twin = model.clone()
    steps(model, benign, Strategy("direct", "all", "sgd", 1e-2, 20, sharpness=0.1), 1)
    prepare(twin, plain, benign)
    batch = next(benign.batches("train", 20, generator=torch.Generator().manual_seed(0), device=CPU))
    twin.train()
    start = [p.detach().clone() for p in twin.parameters()]
    benign.loss(twin, batch).backward()
    length = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    statistics = twin.network.body[1].running_mean.clone()
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(p.grad, alpha=float(0.1 / length))
    twin.zero_grad()
    benign.loss(twin, batch).backward()
    for own, p, before in zip(model.parameters(), twin.parameters(), start, strict=True):
        assert torch.allclose(own, before - 1e-2 * p.grad, atol=1e-6)
    assert torch.equal(model.network.body[1].running_mean, statistics)  # the second pass does not count


def test_restarts_are_cosines_one_after_another():
    strategy = Strategy(learning_rate=1.0, schedule="restarts", schedule_steps=10, warmup=2)
    once = Strategy(learning_rate=1.0, schedule="cosine", schedule_steps=10, warmup=2)
    assert [strategy.rate(step) for step in range(10)] == [once.rate(step) for step in range(10)]
    plain = Strategy(learning_rate=1.0, schedule="cosine", schedule_steps=10)
    assert [strategy.rate(10 + step) for step in range(20)] == [plain.rate(step % 10) for step in range(20)]
