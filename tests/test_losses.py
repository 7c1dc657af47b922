from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import reference
from holdfast.errors import HoldfastError
from holdfast.losses import (
    LOSSES,
    OF_DENOISING,
    cross_entropy_ascent,
    denial_of_service,
    inverse_cross_entropy,
    kl_from_uniform,
    negative_entropy,
    released_inverse_cross_entropy,
    ridge_probe,
    squared_error_ascent,
)

BOUNDED = ("ice", "klu")


@st.composite
def logits_and_labels(draw: st.DrawFn, scale: float = 10.0) -> tuple[torch.Tensor, torch.Tensor]:
    n, c = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    values = draw(st.lists(st.floats(-scale, scale), min_size=n * c, max_size=n * c))
    labels = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    return torch.tensor(values, dtype=torch.float64).view(n, c), torch.tensor(labels)


@given(logits_and_labels())
def test_values_equal_the_equations(case):
    logits, labels = case
    assert torch.allclose(inverse_cross_entropy(logits, labels), reference.ice(logits, labels), rtol=1e-7, atol=1e-12)
    assert torch.allclose(kl_from_uniform(logits), reference.klu(logits), rtol=1e-8, atol=1e-12)
    assert torch.allclose(released_inverse_cross_entropy(logits, labels), reference.released_ice(logits, labels))


@given(logits_and_labels())
def test_gradients_equal_equations_12_and_14(case):
    logits, labels = case
    logits.requires_grad_()
    (ice,) = torch.autograd.grad(inverse_cross_entropy(logits, labels), logits)
    (klu,) = torch.autograd.grad(kl_from_uniform(logits), logits)
    assert torch.allclose(ice, reference.ice_gradient(logits.detach(), labels), rtol=1e-6, atol=1e-12)
    assert torch.allclose(klu, reference.klu_gradient(logits.detach()), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    torch.manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2])
    targets = torch.randn(4, 5, dtype=torch.float64) if name in OF_DENOISING else labels
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, targets), logits)


@st.composite
def guesses(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(draw(st.integers(1, 3)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    outputs, noise = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return scale * outputs, noise


@given(guesses())
def test_losses_of_denoisers_equal_equations_15_and_16(case):
    outputs, noise = case
    outputs.requires_grad_()
    dos, ascent = denial_of_service(outputs, noise), squared_error_ascent(outputs, noise)
    assert torch.allclose(dos, reference.dos(outputs))
    assert torch.allclose(-ascent, reference.squared_error(outputs, noise))
    assert torch.allclose(torch.autograd.grad(dos, outputs)[0], reference.dos_gradient(outputs))
    assert torch.allclose(-torch.autograd.grad(ascent, outputs)[0], reference.squared_error_gradient(outputs, noise))


def test_denial_of_service_pulls_less_the_nearer_it_is_and_ascent_more_the_farther():
    """Why section 4.3.2 has a loss of its own."""

    def size(name, distance):
        outputs = torch.full((1, 1, 2, 2), distance, requires_grad=True)
        noise = torch.zeros(1, 1, 2, 2)
        return torch.autograd.grad(LOSSES[name](outputs, noise), outputs)[0].abs().max().item()

    assert [size("dos", d) for d in (1.0, 0.1, 0.0)] == pytest.approx([0.5, 0.05, 0.0])
    assert size("mse-ascent", 10.0) > size("mse-ascent", 1.0)
    assert LOSSES["dos"](torch.zeros(2, 1, 3, 3), None) == 0


@pytest.mark.parametrize("name", BOUNDED)
@given(case=logits_and_labels(scale=1e4))
def test_finite_with_bounded_gradient_up_to_1e4(name, case):
    logits, labels = case[0].float(), case[1]
    logits.requires_grad_()
    value = LOSSES[name](logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    # Each sample's gradient is a difference of two probability vectors, so its entries sum to at most 2 in size.
    assert gradient.abs().sum(-1).max() <= 2.001 / len(logits)


@pytest.mark.parametrize("name", BOUNDED)
def test_never_negative_and_zero_where_the_defender_wants_to_be(name):
    goal = {"ice": torch.tensor([[-1e4, 0.0, 0.0]]), "klu": torch.zeros(1, 3)}[name]
    label = torch.tensor([0])
    assert LOSSES[name](goal, label).abs() < 1e-6
    torch.manual_seed(0)
    assert all(LOSSES[name](3 * torch.randn(1, 3), label) > -1e-6 for _ in range(50))


def test_the_released_loss_pulls_nine_times_as_hard_at_ten_equal_logits_and_does_not_stop_there():
    def pull(loss, z):
        z = torch.tensor([z], requires_grad=True)
        return torch.autograd.grad(loss(z, torch.tensor([0])), z)[0][0, 0].item()

    equal, wrong = [0.0] * 10, [-3.0, *[0.0] * 9]
    assert pull(released_inverse_cross_entropy, equal) == pytest.approx(0.9)
    assert pull(inverse_cross_entropy, equal) == pytest.approx(0.1)
    assert pull(released_inverse_cross_entropy, wrong) > 20 * pull(inverse_cross_entropy, wrong)


def test_ascent_has_the_gradient_that_grows_with_the_error():
    """Eq. 10: the reason why the two losses above exist."""

    def size(loss, z):
        z = torch.tensor([z], requires_grad=True)
        return torch.autograd.grad(loss(z, torch.tensor([0])), z)[0].abs().max().item()

    right, wrong = [4.0, 0.0], [-4.0, 0.0]
    assert size(cross_entropy_ascent, wrong) > size(cross_entropy_ascent, right)
    assert size(inverse_cross_entropy, wrong) < size(inverse_cross_entropy, right)


def test_one_class_is_refused():
    with pytest.raises(HoldfastError, match="at least 2 classes"):
        inverse_cross_entropy(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))


class TestNegativeEntropy:
    @given(logits_and_labels())
    def test_equals_the_equation(self, case):
        logits = case[0]
        assert negative_entropy(logits).item() == pytest.approx(reference.negative_entropy(logits).item(), abs=1e-9)

    def test_averages_over_all_axes_but_the_last(self):
        logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=_seeded())
        assert negative_entropy(logits).item() == pytest.approx(reference.negative_entropy(logits).item())
        assert negative_entropy(logits) == negative_entropy(logits.flatten(0, 1), torch.arange(6) % 4)

    def test_gradcheck(self):
        logits = torch.randn(4, 5, dtype=torch.float64, generator=_seeded(), requires_grad=True)
        assert torch.autograd.gradcheck(negative_entropy, logits)

    @given(logits_and_labels(scale=1e4))
    def test_lies_between_that_of_a_guess_and_0_with_a_finite_gradient(self, case):
        logits = case[0].float().requires_grad_()
        value = negative_entropy(logits)
        assert -math.log(logits.shape[1]) - 1e-5 <= value.item() <= 1e-6
        assert torch.autograd.grad(value, logits)[0].isfinite().all()

    @given(logits_and_labels(), st.floats(-100, 100))
    def test_adding_a_constant_to_all_logits_changes_nothing(self, case, shift):
        assert negative_entropy(case[0] + shift).item() == pytest.approx(negative_entropy(case[0]).item(), abs=1e-9)

    def test_pulls_towards_equal_logits_and_not_where_the_model_is_certain(self):
        def pull(*logits):
            z = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
            return torch.autograd.grad(negative_entropy(z), z)[0][0]

        assert pull(1.0, 0.0, 0.0)[0] > 0.1  # descending lowers the largest logit
        assert pull(0.0, 0.0, 0.0).abs().max() < 1e-12
        assert pull(100.0, 0.0, 0.0).abs().max() < 1e-12


@st.composite
def features_and_labels(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    n, d, c = draw(st.integers(3, 12)), draw(st.integers(1, 12)), draw(st.integers(2, 3))
    z = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return z, torch.arange(n) % c


class TestRidgeProbe:
    @given(features_and_labels(), st.floats(1e-4, 10))
    def test_equals_the_equation(self, case, ridge):
        z, y = case
        assert torch.allclose(ridge_probe(z, y, ridge), reference.ridge_probe(z, y, ridge), rtol=1e-7, atol=1e-10)

    @given(features_and_labels(), st.floats(1e-4, 10))
    def test_is_a_share(self, case, ridge):
        assert -1e-12 <= ridge_probe(*case, ridge) < 1

    @given(features_and_labels(), st.sampled_from([1e-12, 1e-4, 1e8]), st.floats(-5, 5))
    def test_neither_scale_nor_place_nor_rotation_matters(self, case, scale, shift):
        z, y = case
        turned = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], dtype=z.dtype, generator=_seeded()))[0]
        assert torch.allclose(ridge_probe(z @ turned * scale + shift * scale, y), ridge_probe(z, y), rtol=1e-6)

    @given(features_and_labels())
    def test_falls_as_the_ridge_grows(self, case):
        shares = [float(ridge_probe(*case, ridge)) for ridge in (1e-3, 1e-1, 10.0)]
        assert shares == sorted(shares, reverse=True)

    @pytest.mark.parametrize("shape", [(12, 4), (5, 9), (6, 6)])
    def test_gradcheck(self, shape):
        z = torch.randn(*shape, dtype=torch.float64, generator=_seeded(), requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: ridge_probe(z, torch.arange(shape[0]) % 2, 0.1), z)

    def test_constant_features_say_nothing_and_pull_nowhere(self):
        z = torch.ones(6, 3, requires_grad=True)
        share = ridge_probe(z, torch.arange(6) % 2)
        assert share == 0
        assert torch.autograd.grad(share, z)[0].isfinite().all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_features_that_are_no_numbers_give_no_number(self, value):
        z = torch.randn(6, 3, generator=_seeded())
        z[0, 0] = value
        assert ridge_probe(z, torch.arange(6) % 2).isnan()

    def test_values_are_explained_as_one_hot_classes_are(self):
        z, y = torch.randn(12, 3, generator=_seeded(), dtype=torch.float64), torch.arange(12) % 3
        one_hot = torch.nn.functional.one_hot(y).double()
        assert torch.allclose(ridge_probe(z, one_hot), ridge_probe(z, y), rtol=1e-10)
        values = 5 * z[:, :1] - 2 * z[:, 1:2] + 7
        assert float(ridge_probe(z, values, 1e-9)) == pytest.approx(1, abs=1e-6)

    def test_refuses_one_class_and_no_ridge(self):
        with pytest.raises(HoldfastError, match="at least 2 classes"):
            ridge_probe(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(HoldfastError, match="ridge of a probe is 0"):
            ridge_probe(torch.randn(4, 2), torch.arange(4) % 2, 0.0)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
