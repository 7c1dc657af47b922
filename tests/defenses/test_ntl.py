from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import reference
from conftest import toy_task
from holdfast.defenses import NTL
from holdfast.defenses.ntl import ntl_loss
from holdfast.errors import HoldfastError
from holdfast.losses import mmd
from holdfast.models import SplitModel
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import load_task

CPU = torch.device("cpu")
BRIEF = NTL(iterations=6, batch_size=20, guard_every=2, max_benign_drop=1.0)


@st.composite
def two_batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    n, m, width = (draw(st.integers(1, 6)) for _ in range(3))
    scale, shift = draw(st.sampled_from([1e-3, 1.0, 1e3])), draw(st.floats(-1e3, 1e3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x, y = (torch.randn(k, width, dtype=torch.float64, generator=generator) * scale for k in (n, m))
    return x, y + shift


class TestMMD:
    @settings(max_examples=40)
    @given(two_batches(), st.integers(1, 6), st.sampled_from([1.5, 2.0, 3.0]))
    def test_equals_the_equation(self, batches, kernels, multiplier):
        x, y = batches
        found = mmd(x, y, kernels=kernels, multiplier=multiplier)
        assert found.item() == pytest.approx(reference.mmd(x, y, kernels, multiplier).item(), rel=1e-6, abs=1e-6)

    @given(two_batches(), st.integers(1, 6))
    def test_is_between_zero_and_twice_the_number_of_kernels(self, batches, kernels):
        assert -1e-9 <= mmd(*batches, kernels=kernels).item() < 2 * kernels

    @given(two_batches())
    def test_is_zero_between_a_batch_and_itself(self, batches):
        assert abs(mmd(batches[0], batches[0]).item()) < 1e-9

    @given(two_batches(), st.randoms(use_true_random=False))
    def test_sees_neither_the_order_of_batches_nor_of_samples(self, batches, random):
        x, y = batches
        order = random.sample(range(len(x)), len(x))
        here = pytest.approx(mmd(x, y).item(), abs=1e-6)
        assert mmd(y, x).item() == here
        assert mmd(x[order], y).item() == here

    @given(two_batches(), st.floats(0.01, 100), st.floats(-10, 10))
    def test_sees_neither_scale_nor_place_of_all_features(self, batches, scale, shift):
        x, y = batches
        assert mmd(scale * x + shift, scale * y + shift).item() == pytest.approx(mmd(x, y).item(), abs=1e-5)

    @pytest.mark.parametrize("width", [0.5, 3.0])
    def test_gradcheck(self, width):
        torch.manual_seed(0)
        x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
        assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, bandwidth=width), (x, y))

    def test_no_gradient_is_taken_for_the_bandwidth(self):
        torch.manual_seed(0)
        x, y = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        both = torch.cat([x, y]).detach()
        base = torch.cdist(both, both).square().sum() / (8 * 7)
        ours, given_width = (torch.autograd.grad(mmd(x, y, bandwidth=b), x)[0] for b in (None, base))
        assert torch.allclose(ours, given_width, rtol=1e-9)

    def test_features_that_are_all_alike_give_zero_and_a_finite_gradient(self):
        x, y = (torch.full((3, 4), 2.5, requires_grad=True) for _ in range(2))
        value = mmd(x, y)
        assert value.item() == 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, (x, y)))

    def test_float32_far_from_the_origin_agrees_with_float64(self):
        """Squares of 1e4 hold no distances of 1 in float32."""
        torch.manual_seed(0)
        x, y = torch.randn(8, 4, dtype=torch.float64) + 1e4, torch.randn(8, 4, dtype=torch.float64) + 1e4 + 2
        assert mmd(x.float(), y.float()).item() == pytest.approx(mmd(x, y).item(), abs=1e-2)


class TestLoss:
    @pytest.mark.parametrize("settings", [(0.1, 0.1, 1.0), (2.0, 0.1, 1.0), (0.1, 3.0, 1.0), (2.0, 3.0, 0.5)])
    def test_equals_the_equation(self, settings):
        alpha, beta, clamp = settings
        torch.manual_seed(0)
        logits = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
        labels = torch.randint(4, (5,)), torch.randint(4, (6,))
        features = torch.randn(5, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64) + 2
        losses = (F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True))
        found = ntl_loss(*losses, mmd(*features), alpha=alpha, beta=beta, clamp=clamp)
        expected = reference.ntl(
            logits, labels, features, alpha=alpha, beta=beta, clamp=clamp, kernels=5, multiplier=2.0
        )
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)

    @pytest.mark.parametrize(
        ("restricted", "distance", "by_restricted", "by_distance"),
        [
            (4.0, 5.0, -0.1 * 0.5, -0.1 * 0.4),  # below both clamps
            (10.1, 5.0, 0.0, -0.1),  # 1: the restricted labels pull no more
            (4.0, 10.1, -0.1, 0.0),  # 2: the features move apart no more
            (10.1, 10.1, 0.0, 0.0),  # 3: only the benign loss is left
            (4.0, 0.0, 0.0, -0.1 * 0.4),  # 4: one factor is 0, the other has no gradient
            (0.0, 5.0, -0.1 * 0.5, 0.0),
        ],
    )
    def test_where_the_gradient_vanishes(self, restricted, distance, by_restricted, by_distance):
        values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, restricted, distance)]
        found = [g.item() for g in torch.autograd.grad(ntl_loss(*values), values)]
        assert found == pytest.approx([1.0, by_restricted, by_distance])

    @given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0.1, 3))
    def test_the_restricted_part_is_bounded(self, restricted, distance, clamp):
        found = ntl_loss(torch.tensor(0.0), torch.tensor(restricted), torch.tensor(distance), clamp=clamp)
        assert -(clamp**2) * (1 + 1e-6) <= found.item() <= 0

    def test_with_the_defaults_the_mmd_never_reaches_its_clamp(self):
        """Ten is twice the number of kernels, and the most that two batches can have between them is less."""
        found = mmd(torch.zeros(50, 2), torch.full((50, 2), 1e6))
        assert NTL().beta * found.item() < 0.8 < NTL().clamp


class TestNTL:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"iterations": 0}, "ntl: iterations is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"kernels": 0}, "kernels is 0"),
            ({"learning_rate": 0.0}, "learning_rate is 0"),
            ({"alpha": math.nan}, "alpha is nan"),
            ({"beta": -1.0}, "beta is -1"),
            ({"clamp": math.inf}, "clamp is inf"),
            ({"multiplier": 0.0}, "multiplier is 0"),
            ({"weight_decay": -1.0}, "weight_decay is -1"),
            ({"optimizer": "adm"}, "did you mean 'adam'"),
            ({"holdout": 0.0}, "holdout is 0"),
            ({"max_benign_drop": 2.0}, "max_benign_drop is 2"),
        ],
    )
    def test_bad_settings(self, change, message):
        with pytest.raises(HoldfastError, match=message):
            NTL(**change)

    def test_defaults_are_the_papers(self):
        d = NTL()
        assert (d.alpha, d.beta, d.clamp, d.kernels, d.multiplier) == (0.1, 0.1, 1.0, 5, 2.0)

    def test_more_restricted_classes_than_outputs_are_refused(self, run):
        narrow, wide = toy_task(2), toy_task(3)
        model = SplitModel(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), "2")
        with pytest.raises(HoldfastError, match=r"3 classes, but the head.*2 outputs.*Keep at most 2"):
            BRIEF.immunize(model, narrow, wide, run=run)

    def test_fewer_restricted_classes_are_welcome(self, trained, benign, run):
        brief = dataclasses.replace(BRIEF, iterations=1)
        immunized, _ = brief.immunize(trained, benign, load_task("digits[7-9]"), run=run)
        assert immunized.num_outputs == 5

    def test_inputs_of_two_shapes_are_refused(self, model, benign, run):
        other = load_task("digits[5-9]").as_images(12)
        with pytest.raises(HoldfastError, match=r"shape \(1, 8, 8\), those of .* \(1, 12, 12\)"):
            BRIEF.immunize(model, benign, other, run=run)

    def test_one_step_is_the_optimizers_on_the_equation(self, run):
        """Plain gradient descent moves every weight by the rate times the gradient of the slow loss."""
        task, other = toy_task(3, samples=8), toy_task(3, samples=8, seed=1)
        torch.manual_seed(0)
        model = SplitModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), "2")
        whole = NTL(iterations=1, optimizer="sgd", learning_rate=0.1, batch_size=10**6, max_benign_drop=1.0)
        moved, record = whole.immunize(model, task, other, run=run)
        kept = task.holdout(whole.holdout, derive_seed(run.seed, "ntl", "holdout"))[0]
        batches = [next(t.sweep("train", 10**6, device=CPU)) for t in (kept, other)]
        features = [torch.tanh(model.network[0](b.x)) for b in batches]
        logits = tuple(model.network[2](z) for z in features)
        labels = tuple(b.y for b in batches)
        # The twin's bandwidths are plain numbers, so that autograd goes through it as through ours.
        loss = reference.ntl(logits, labels, tuple(features), alpha=0.1, beta=0.1, clamp=1.0, kernels=5, multiplier=2.0)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for new, old, gradient in zip(moved.parameters(), model.parameters(), gradients, strict=True):
            assert torch.allclose(new, old - 0.1 * gradient, atol=1e-6)
        assert record.history["mmd"][0] == pytest.approx(float(reference.mmd(*features, 5, 2.0)), rel=1e-4)

    def test_unlearns_the_restricted_task_and_keeps_the_benign_one(self, trained, benign, restricted, run):
        immunized, record = NTL(iterations=120).immunize(trained, benign, restricted, run=run)
        assert record.completed
        assert restricted.score(immunized) < restricted.chance
        assert benign.score(immunized) > benign.score(trained) - 0.03
        assert record.history["restricted_loss"][-1] > 2 * record.history["restricted_loss"][0]
        assert record.history["mmd"][-1] > record.history["mmd"][0]
        looks = [s is not None for s in record.history["benign_score"]]
        assert looks == [(i + 1) % 10 == 0 for i in range(120)]

    def test_stops_and_continues_to_the_same_model(self, trained, benign, restricted, tmp_path):
        class Killed(Exception):
            pass

        class Interrupted(Run):
            def seeded(self, *purpose):
                if purpose[:2] == ("ntl", 5):
                    raise Killed
                return super().seeded(*purpose)

        whole, record = BRIEF.immunize(trained, benign, restricted, run=Run(0, CPU))
        with pytest.raises(Killed):
            BRIEF.immunize(trained, benign, restricted, run=Interrupted(0, CPU, tmp_path))
        resumed, again = BRIEF.immunize(trained, benign, restricted, run=Run(0, CPU, tmp_path))
        assert resumed.facts().sha256 == whole.facts().sha256
        assert again == record
        with pytest.raises(HoldfastError, match="another immunization"):
            dataclasses.replace(BRIEF, alpha=0.2).immunize(trained, benign, restricted, run=Run(0, CPU, tmp_path))

    def test_a_ruined_model_is_not_the_result(self, trained, benign, restricted, run):
        violent = NTL(iterations=4, optimizer="sgd", learning_rate=1e3, batch_size=20, guard_every=1)
        immunized, record = violent.immunize(trained, benign, restricted, run=run)
        assert benign.score(immunized) > benign.score(trained) - 0.06
        assert not record.completed
        assert record.events

    def test_values_that_are_not_finite_halve_the_rate(self, trained, benign, restricted, run):
        violent = NTL(iterations=8, optimizer="sgd", learning_rate=1e30, batch_size=20, max_rollbacks=3)
        immunized, record = violent.immunize(trained, benign, restricted, run=run)
        assert immunized.facts().sha256 == trained.facts().sha256  # the last good state
        assert "not finite" in record.events[0].message
        assert "learning_rate halved to 5e+29" in record.events[0].message
        assert "gave up after 3 times" in record.events[-1].message
        assert not record.completed

    def test_without_the_guard_a_value_that_is_not_finite_ends_it(self, trained, benign, restricted, run):
        violent = NTL(iterations=8, optimizer="sgd", learning_rate=1e30, batch_size=20, guard=False)
        _, record = violent.immunize(trained, benign, restricted, run=run)
        assert not record.completed
        assert "the guard is off" in record.events[-1].message
