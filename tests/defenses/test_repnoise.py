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
from holdfast.defenses import RepNoise
from holdfast.defenses.repnoise import _Immunization, noise_loss
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import load_task

CPU = torch.device("cpu")
BRIEF = RepNoise(iterations=6, batch_size=20, guard_every=2, max_benign_drop=1.0)


def loss(states, noise):
    return noise_loss(states, noise, kernels=5, multiplier=2.0)


@st.composite
def states_and_noise(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rows = draw(st.integers(1, 5))
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    noise, states = (
        [torch.randn(rows, width, dtype=torch.float64, generator=generator) for width in widths] for _ in range(2)
    )
    return [scale * z for z in states], noise


class TestNoiseLoss:
    @settings(max_examples=30)
    @given(states_and_noise(), st.integers(1, 5), st.sampled_from([1.5, 2.0]))
    def test_value_and_gradient_equal_the_equations(self, case, kernels, multiplier):
        states, noise = case
        states = [z.requires_grad_() for z in states]
        fast = noise_loss(states, noise, kernels=kernels, multiplier=multiplier)
        slow = reference.noise_loss(states, noise, kernels, multiplier)
        assert fast.item() == pytest.approx(slow.item(), rel=1e-6, abs=1e-6)
        for mine, expected in zip(torch.autograd.grad(fast, states), torch.autograd.grad(slow, states), strict=True):
            assert torch.allclose(mine, expected, rtol=1e-6, atol=1e-9)

    @settings(max_examples=40)
    @given(states_and_noise())
    def test_is_bounded_and_zero_at_the_noise_itself(self, case):
        states, noise = case
        assert -1e-9 <= loss(states, noise).item() < 10
        assert abs(loss(noise, noise).item()) < 1e-9

    @settings(max_examples=40)
    @given(states_and_noise())
    def test_sees_neither_the_order_of_rows_nor_of_depths(self, case):
        states, noise = case
        turned = loss([z.flip(0) for z in states][::-1], noise[::-1])
        assert turned.item() == pytest.approx(loss(states, noise).item(), abs=1e-6)

    @pytest.mark.parametrize(
        "states",
        [
            torch.full((8, 3), 2.5),  # constant
            torch.zeros(1, 3),  # one row
            torch.full((8, 3), 1e15),  # huge
            torch.full((8, 3), 1e-30),  # tiny
        ],
    )
    def test_extremes_have_a_finite_value_and_gradient(self, states):
        states = states.requires_grad_()
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        value = loss([states], [noise])
        assert 0 < value.item() < 10
        assert torch.autograd.grad(value, states)[0].isfinite().all()

    def test_descending_it_turns_constant_rows_into_noise(self):
        """Mean and spread approach those of a standard Gaussian."""
        generator = torch.Generator().manual_seed(0)
        states = (0.1 * torch.randn(64, 4, generator=generator) + 3).requires_grad_()
        optimizer = torch.optim.Adam([states], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss([states], [torch.randn(64, 4, generator=generator)]).backward()
            optimizer.step()
        assert states.mean().abs() < 0.3
        assert 0.6 < states.std() < 1.4


class TestRepNoise:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"iterations": 0}, "repnoise: iterations is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"depth": 0}, "depth is 0"),
            ({"kernels": 0}, "kernels is 0"),
            ({"rows": 0}, "rows is 0; expected at least 1"),
            ({"learning_rate": 0.0}, "learning_rate is 0"),
            ({"multiplier": 0.0}, "multiplier is 0"),
            ({"alpha": -1.0}, r"alpha is -1\.0; expected a number of at least 0"),
            ({"beta": math.nan}, "beta is nan"),
            ({"alpha": 0.0, "beta": 0.0}, "alpha and beta are 0"),
            ({"optimizer": "adm"}, "did you mean 'adam'"),
        ],
    )
    def test_bad_settings(self, change, message):
        with pytest.raises(HoldfastError, match=message):
            RepNoise(**change)

    def test_defaults_of_the_loss_are_the_papers(self):
        d = RepNoise()
        assert (d.alpha, d.beta, d.depth, d.kernels, d.multiplier) == (1.0, 1e-3, None, 5, 2.0)

    def test_a_step_is_the_optimizers_on_the_equation(self, run):
        task, other = toy_task(3, samples=8), toy_task(3, samples=6, seed=1)
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
        model = SplitModel(nn.Sequential(*layers), "4")
        whole = RepNoise(
            iterations=1, optimizer="sgd", learning_rate=0.1, batch_size=10**6, alpha=0.7, beta=0.3, max_benign_drop=1.0
        )
        moved, record = whole.immunize(model, task, other, run=run)
        kept = task.holdout(whole.holdout, derive_seed(run.seed, "repnoise", "holdout"))[0]
        with run.seeded("repnoise", 0, 0) as generator:
            a, b = (next(t.batches("train", 10**6, generator=generator, device=CPU)) for t in (kept, other))
            states = [model.network[:2](b.x), model.network[:4](b.x)]
            noise = [torch.randn(z.shape, generator=generator) for z in states]
        noised = reference.noise_loss(states, noise, 5, 2.0)
        ascent = torch.log(1 + F.cross_entropy(model(b.x), b.y))
        total = F.cross_entropy(model(a.x), a.y) + 0.7 * noised - 0.3 * ascent
        gradients = torch.autograd.grad(total, list(model.parameters()))
        for new, old, gradient in zip(moved.parameters(), model.parameters(), gradients, strict=True):
            assert torch.allclose(new, old - 0.1 * gradient, atol=1e-6)
        assert record.history["noise_loss"][0] == pytest.approx(noised.item(), rel=1e-4)

    def test_states_become_noise_and_the_benign_task_is_kept(self, trained, benign, restricted, run):
        brief = RepNoise(iterations=80)
        immunized, record = brief.immunize(trained, benign, restricted, run=run)
        noise, loss = record.history["noise_loss"], record.history["restricted_loss"]
        assert record.completed
        assert sum(noise[-5:]) / 5 < 0.7 * noise[0]
        assert all(value is not None for value in loss)
        assert benign.score(immunized) > benign.score(trained) - 0.06

    def test_ascent_raises_the_restricted_loss(self, trained, benign, restricted, run):
        brief = RepNoise(iterations=60, alpha=0.0, beta=1.0)
        _, record = brief.immunize(trained, benign, restricted, run=run)
        assert record.history["restricted_loss"][-1] > 2 * record.history["restricted_loss"][0]

    def test_without_the_ascent_no_restricted_label_counts(self, trained, benign, restricted, run):
        def immunized(task, beta):
            brief = dataclasses.replace(BRIEF, beta=beta, iterations=2)
            made, record = brief.immunize(trained, benign, task, run=run)
            return made.facts().sha256, record.history["restricted_loss"]

        other = restricted.subset([1, 2, 3, 4, 0])
        digest, losses = immunized(restricted, 0.0)
        assert digest == immunized(other, 0.0)[0]
        assert immunized(restricted, 1.0)[0] != immunized(other, 1.0)[0]
        assert losses == [None, None]

    def test_more_restricted_classes_than_outputs_are_refused_unless_labels_do_not_count(self, trained, benign, run):
        wide = load_task("digits")
        with pytest.raises(HoldfastError, match=r"10 classes.*only 5 outputs.*Keep at most 5.*set beta to 0"):
            BRIEF.immunize(trained, benign, wide, run=run)
        brief = dataclasses.replace(BRIEF, beta=0.0, iterations=1)
        immunized, _ = brief.immunize(trained, benign, wide, run=run)
        assert immunized.num_outputs == 5

    def test_statistics_of_batchnorm_stay_the_originals(self, trained, benign, restricted, run):
        immunized, _ = dataclasses.replace(BRIEF, iterations=2).immunize(trained, benign, restricted, run=run)
        after = dict(immunized.network.named_buffers())
        assert any("running" in name for name in after)
        assert all(torch.equal(after[n], value) for n, value in trained.network.named_buffers())

    def test_inputs_of_two_shapes_are_welcome(self, trained, benign, run):
        other = load_task("digits[5-9]").as_images(12)
        immunized, _ = dataclasses.replace(BRIEF, iterations=1).immunize(trained, benign, other, run=run)
        assert immunized.facts().sha256 != trained.facts().sha256

    def test_at_most_so_many_rows_are_compared(self, trained, benign, restricted, run):
        work = _Immunization(dataclasses.replace(BRIEF, rows=7), trained, benign, restricted, run)
        states = torch.arange(20.0)[:, None]
        chosen = work._chosen(states, torch.Generator().manual_seed(0))
        assert len(set(chosen.flatten().tolist())) == 7
        assert work._chosen(states[:7], torch.Generator()) is not chosen
        assert torch.equal(work._chosen(states[:7], torch.Generator()), states[:7])

    def test_stops_and_continues_to_the_same_model(self, trained, benign, restricted, tmp_path):
        class Killed(Exception):
            pass

        class Interrupted(Run):
            def seeded(self, *purpose):
                if purpose[:2] == ("repnoise", 5):
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
        violent = RepNoise(iterations=4, optimizer="sgd", learning_rate=1e3, batch_size=20, guard_every=1)
        immunized, record = violent.immunize(trained, benign, restricted, run=run)
        assert benign.score(immunized) > benign.score(trained) - 0.06
        assert not record.completed
        assert record.events
