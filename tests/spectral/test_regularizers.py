from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

import reference
from holdfast.errors import HoldfastError
from holdfast.spectral.condition_numbers import spectrum
from holdfast.spectral.preconditioning import PreconditionedLinear, Preconditioner
from holdfast.spectral.regularizers import (
    ill_gradient,
    ill_step_bound,
    r_ill,
    r_ill_of_features,
    r_well,
    r_well_of_features,
    well_gradient,
    well_step_bound,
)

DRAWN = settings(deadline=None, max_examples=60)
OF_MATRIX = {False: r_well, True: r_ill}
OF_FEATURES = {False: r_well_of_features, True: r_ill_of_features}
GRADIENT = {False: reference.r_well_gradient, True: reference.r_ill_gradient}
ILL = pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])


@st.composite
def spectra(draw: st.DrawFn, rank: int, max_log_kappa: float) -> Tensor:
    """Simple singular values, descending: neighbours differ by a tenth at least, where there is room for that."""
    if rank == 1:
        return torch.tensor([draw(st.floats(0.1, 10))], dtype=torch.float64)
    gaps = torch.tensor([draw(st.floats(0.1, 1)) for _ in range(rank - 1)], dtype=torch.float64)
    total = draw(st.floats(0.05 * rank, max_log_kappa))
    exponents = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)]) * total / gaps.sum()
    return draw(st.floats(0.1, 10)) * 10**-exponents


@st.composite
def matrices(draw: st.DrawFn, max_log_kappa: float = 6.0, min_rank: int = 1) -> tuple[Tensor, Tensor]:
    """Matrices of any shape and rank."""
    rows, columns = draw(st.integers(min_rank, 8)), draw(st.integers(min_rank, 8))
    rank = draw(st.integers(min_rank, min(rows, columns)))
    sigma = draw(spectra(rank, max_log_kappa))
    return reference.matrix(rows, columns, sigma, draw(st.integers(0, 2**32))), sigma


@st.composite
def probes(draw: st.DrawFn, max_log_kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """Data X of full column rank, an extractor of any width and rank, and the eigenvalues of H = theta'X'X theta.

    The eigenvalues are given; theta = X^+ Z for features Z with their roots as singular values.
    """
    width, out = draw(st.integers(2, 7)), draw(st.integers(2, 7))
    rows = width + draw(st.integers(0, 6))
    rank = draw(st.integers(2, min(width, out)))
    seed = draw(st.integers(0, 2**32))
    x = reference.matrix(rows, width, torch.logspace(0, -draw(st.floats(0, 1)), width, dtype=torch.float64), seed)
    eigenvalues = draw(spectra(rank, max_log_kappa))
    u, _, _ = torch.linalg.svd(x, full_matrices=False)
    z = u @ reference.matrix(width, out, eigenvalues.sqrt(), seed + 1)
    return x, torch.linalg.pinv(x) @ z, eigenvalues


def differentiate(function, at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.detach().clone().requires_grad_()
    value = function(at)
    (gradient,) = torch.autograd.grad(value, at)
    return value.detach(), gradient


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> bool:
    """Agreement relative to the size of the whole."""
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * max(a.norm(), b.norm()))


def rotation(size: int, seed: int) -> Tensor:
    return reference.matrix(size, size, torch.ones(size, dtype=torch.float64), seed)


@ILL
class TestClosedForms:
    @DRAWN
    @given(matrices(min_rank=2))
    def test_value_and_gradient_equal_the_equations_and_autograd(self, ill, case):
        s, sigma = case
        assume(len(sigma) > 1)
        value, gradient = differentiate(OF_MATRIX[ill], s)
        slow, by_autograd = differentiate(reference.r_ill if ill else reference.r_well, s)
        assert value == pytest.approx(slow.item(), rel=1e-8)
        assert close(gradient, by_autograd)
        assert close(gradient, GRADIENT[ill](s))

    @DRAWN
    @given(matrices(min_rank=2))
    def test_of_features_is_that_of_their_hessian_and_its_gradient_is_theorem_4_2(self, ill, case):
        """Hessians of kappa up to 1e12, more and fewer samples than features, any rank."""
        z, sigma = case
        assume(len(sigma) > 1)
        value, gradient = differentiate(OF_FEATURES[ill], z)
        slow = (reference.r_ill if ill else reference.r_well)(z.T @ z)
        assert value == pytest.approx(slow.item(), rel=1e-8)
        identity = torch.eye(z.shape[1], dtype=torch.float64)
        k = z.T @ z
        # Theorem 4.2 with theta = I: X' grad_Z = 2 K grad R(K).
        assert close(z.T @ gradient, reference.gradient_by_theta(identity, k, ill=ill))
        assert close(gradient, 2 * z @ GRADIENT[ill](k))

    @DRAWN
    @given(matrices(max_log_kappa=2, min_rank=2))
    def test_of_features_agrees_with_autograd_through_the_hessian(self, ill, case):
        z, sigma = case
        assume(len(sigma) > 1)
        _, gradient = differentiate(OF_FEATURES[ill], z)
        _, slow = differentiate(lambda z: (reference.r_ill if ill else reference.r_well)(z.T @ z), z)
        assert close(gradient, slow)

    @pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 6)])
    def test_gradcheck(self, ill, shape):
        sigma = torch.tensor([2.0, 1.3, 0.8, 0.5], dtype=torch.float64)[: min(shape)]
        x = reference.matrix(*shape, sigma, 0).requires_grad_()
        assert torch.autograd.gradcheck(OF_MATRIX[ill], x)
        assert torch.autograd.gradcheck(OF_FEATURES[ill], x)

    @DRAWN
    @given(matrices(min_rank=2))
    def test_gradient_from_eigenpairs_is_that_of_the_matrix(self, ill, case):
        z, _ = case
        _, found, v = reference.compact_svd(z)
        gradient = (ill_gradient if ill else well_gradient)(found.square(), v)
        assert close(gradient, GRADIENT[ill](z.T @ z), 1e-7)

    def test_the_upstream_gradient_multiplies(self, ill):
        s = normal(4, 3)
        _, once = differentiate(OF_MATRIX[ill], s)
        _, scaled = differentiate(lambda s: -2.5 * OF_MATRIX[ill](s), s)
        assert close(scaled, -2.5 * once, 1e-14)

    @DRAWN
    @given(matrices(max_log_kappa=3, min_rank=2), st.integers(0, 1000))
    def test_rotations_of_either_side_turn_the_gradient_along(self, ill, case, seed):
        s, _ = case
        left, right = rotation(len(s), seed), rotation(s.shape[1], seed + 1)
        value, gradient = differentiate(OF_MATRIX[ill], s)
        turned, of_turned = differentiate(OF_MATRIX[ill], left @ s @ right)
        assert turned == pytest.approx(value.item(), rel=1e-8)
        assert close(of_turned, left @ gradient @ right)

    def test_a_second_differentiation_is_refused(self, ill):
        s = normal(3, 3).requires_grad_()
        (gradient,) = torch.autograd.grad(OF_MATRIX[ill](s), s, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            gradient.sum().backward()


class TestTheoremA1:
    """Properties of R_well, for matrices of any rank p."""

    @DRAWN
    @given(matrices())
    def test_never_negative_and_zero_exactly_if_kappa_is_1(self, case):
        s, sigma = case
        value = r_well(s).item()
        assert value >= 0
        if len(sigma) > 1:
            assert value >= 0.999 * (sigma[0] ** 2 - sigma[-1] ** 2).item() / (2 * len(sigma)) > 0
        else:
            assert value == 0

    @DRAWN
    @given(st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 1e3), st.integers(0, 1000))
    def test_zero_where_kappa_is_1_at_any_rank(self, rank, more, size, seed):
        s = reference.matrix(rank + more, rank + 1, torch.full((rank,), size, dtype=torch.float64), seed)
        value, gradient = differentiate(r_well, s)
        assert value <= 1e-13 * size**2
        assert gradient.norm() <= 1e-12 * size

    @DRAWN
    @given(matrices())
    def test_bounds_log_kappa_from_above(self, case):
        s, sigma = case
        bound = len(sigma) / sigma[-1].item() ** 2 * r_well(s).item()
        assert math.log(reference.kappa(s)) <= bound * (1 + 1e-6) + 1e-12

    @DRAWN
    @given(matrices(min_rank=2), st.floats(0.01, 0.999))
    def test_a_step_lowers_kappa(self, case, fraction):
        s, sigma = case
        _, gradient = differentiate(r_well, s)
        eta = fraction * (1 - sigma[1] / sigma[0]).item()
        p = len(sigma)
        after = spectrum(s - eta * gradient)
        expected = torch.cat([sigma[:1] * (1 - eta * (p - 1) / p), sigma[1:] * (1 + eta / p)])
        assert torch.allclose(after.values, expected, rtol=1e-8)
        assert after.condition < reference.kappa(s) * (1 - 1e-6 * fraction)


class TestTheorem41:
    """Properties of R_ill, for matrices of any rank k."""

    @DRAWN
    @given(matrices())
    def test_above_zero_and_infinite_exactly_if_kappa_is_1(self, case):
        s, sigma = case
        value = r_ill(s).item()
        if len(sigma) == 1:
            assert value == math.inf
        else:
            assert 0 < value < math.inf
            # 1/R <= (sigma_1^2 - sigma_k^2)/2: small values come from large spreads alone
            assert value * (sigma[0] ** 2 - sigma[-1] ** 2).item() >= 2 * (1 - 1e-9)

    @DRAWN
    @given(matrices(min_rank=2))
    def test_bounds_the_inverse_of_log_kappa_from_above(self, case):
        s, sigma = case
        assert 1 / math.log(reference.kappa(s)) <= sigma[0].item() ** 2 * r_ill(s).item() * (1 + 1e-9)

    @DRAWN
    @given(matrices(max_log_kappa=5, min_rank=2), st.floats(0.01, 0.999))
    def test_a_step_raises_kappa(self, case, fraction):
        s, sigma = case
        k, denominator = len(sigma), 1 / r_ill(s).item()
        _, gradient = differentiate(r_ill, s)
        eta = fraction * k / (k - 1) * denominator**2
        after = spectrum(s - eta * gradient)
        assert after.rank == k
        share = eta / denominator**2 / k
        expected = torch.cat([sigma[:-1] * (1 + share), sigma[-1:] * (1 - (k - 1) * share)])
        assert torch.allclose(after.values, expected, rtol=1e-7)
        assert after.condition > reference.kappa(s) * (1 + 0.5 * fraction / (k - 1))

    @DRAWN
    @given(matrices(max_log_kappa=5, min_rank=2))
    def test_at_the_bound_the_smallest_singular_value_vanishes(self, case):
        s, sigma = case
        k, denominator = len(sigma), 1 / r_ill(s).item()
        _, gradient = differentiate(r_ill, s)
        after = torch.linalg.svdvals(s - k / (k - 1) * denominator**2 * gradient)
        assert after[k - 1] <= 1e-9 * sigma[0]


class TestTheorem43:
    """The same for Hessians theta'K theta of any rank, when theta moves along K^-1 times the gradient."""

    @staticmethod
    def direction(x: Tensor, theta: Tensor, *, ill: bool) -> Tensor:
        layer = PreconditionedLinear(theta)
        OF_FEATURES[ill](layer(x, Preconditioner(x, ridge=0.0))).backward()
        return layer.theta.grad

    @DRAWN
    @given(probes(max_log_kappa=12), st.floats(0.01, 0.999))
    def test_kappa_falls_below_the_bound_of_r_well(self, case, fraction):
        x, theta, sigma = case
        step = fraction * well_step_bound(sigma)
        p = len(sigma)
        after = torch.linalg.svdvals(x @ (theta - step * self.direction(x, theta, ill=False)))[:p].square()
        a, others = 2 * sigma[0] * (p - 1) / p, sigma[1:] * (1 + 2 * step * sigma[1:] / p) ** 2
        expected = torch.cat([sigma[:1] * (1 - a * step) ** 2, others])
        assert torch.allclose(after, expected, rtol=1e-6)
        assert after[0] / after[-1] < sigma[0] / sigma[-1] * (1 - 0.01 * fraction)

    @DRAWN
    @given(probes(max_log_kappa=12))
    def test_at_the_bound_of_r_well_the_two_largest_eigenvalues_meet(self, case):
        x, theta, sigma = case
        after = spectrum(x @ (theta - well_step_bound(sigma) * self.direction(x, theta, ill=False))).values
        assert after[0] == pytest.approx(after[1].item(), rel=1e-9)

    @DRAWN
    @given(probes(max_log_kappa=12), st.floats(0.01, 0.999))
    def test_kappa_rises_below_the_bound_of_r_ill(self, case, fraction):
        """The step is short enough besides for the new kappa to be seen in float64: it may grow by kappa^2 at once."""
        x, theta, sigma = case
        k, denominator = len(sigma), 1 / r_ill(torch.diag(sigma)).item()
        step = fraction * min(ill_step_bound(sigma), 10 * k * denominator**2 / sigma[0].item())
        after = spectrum(x @ (theta - step * self.direction(x, theta, ill=True)))
        assert after.rank == k
        share = 2 * step / (k * denominator**2)
        lowest = sigma[-1:] * (1 - (k - 1) * share * sigma[-1:]) ** 2
        expected = torch.cat([sigma[:-1] * (1 + share * sigma[:-1]) ** 2, lowest])
        assert torch.allclose(after.values.square(), expected, rtol=1e-4)
        assert after.hessian_condition > (sigma[0] / sigma[-1]).item() * (1 + 0.01 * fraction)

    @DRAWN
    @given(probes(max_log_kappa=2.5), st.floats(0.9, 0.999))
    def test_kappa_rises_up_to_the_bound_of_r_ill_and_at_it_a_direction_is_lost(self, case, fraction):
        x, theta, sigma = case
        direction, bound = self.direction(x, theta, ill=True), ill_step_bound(sigma)
        before, after = ((x @ (theta - share * bound * direction)) for share in (fraction, 1.0))
        assert spectrum(before).hessian_condition > (sigma[0] / sigma[-1]).item() * 10
        values = torch.linalg.svdvals(after)
        assert values[len(sigma) - 1] <= 1e-9 * values[0]

    def test_bounds_are_no_licence_where_the_extreme_eigenvalue_is_not_simple(self):
        tied = torch.tensor([2.0, 2.0, 1.0, 1.0], dtype=torch.float64)
        assert well_step_bound(tied) == ill_step_bound(tied) == 0
        assert well_step_bound(tied[1:]) > 0
        assert ill_step_bound(tied[:3]) > 0

    def test_rank_1_has_nothing_to_lower_and_nothing_to_raise(self):
        one = torch.tensor([3.0], dtype=torch.float64)
        assert well_step_bound(one) == math.inf
        assert ill_step_bound(one) == 0


class TestTies:
    """Not differentiable: the mean over the singular subspace, whatever basis the decomposition returns."""

    @ILL
    @DRAWN
    @given(seed=st.integers(0, 1000))
    def test_the_gradient_does_not_depend_on_the_basis(self, ill, seed):
        sigma = torch.tensor([2.0, 2.0, 1.5, 1.0, 1.0, 1.0], dtype=torch.float64)
        weights = -sigma / 6
        weights[3:] += 1.0 / 3 if ill else 0
        weights[:2] += 0 if ill else 2.0 / 2
        left, right = rotation(6, seed), rotation(6, seed + 1)
        value, gradient = differentiate(OF_MATRIX[ill], left @ torch.diag(sigma) @ right)
        expected = 1 / (sigma.square().mean() / 2 - 0.5) if ill else 2 - sigma.square().mean() / 2
        assert value == pytest.approx(expected.item(), rel=1e-12)
        scale = expected**2 if ill else 1
        assert close(gradient, left @ torch.diag(scale * weights) @ right, 1e-10)

    @ILL
    @pytest.mark.parametrize("shape", [(6, 6), (9, 6), (6, 9)])
    def test_nor_that_of_features(self, ill, shape):
        sigma = torch.tensor([2.0, 2.0, 1.5, 1.0, 1.0, 1.0], dtype=torch.float64)
        u, _, v = reference.compact_svd(reference.matrix(*shape, torch.arange(6.0, 0.0, -1.0).double(), 0))
        _, plain = differentiate(OF_FEATURES[ill], (u * sigma) @ v.T)
        turn = torch.block_diag(rotation(2, 1), torch.eye(1, dtype=torch.float64), rotation(3, 2))
        _, turned = differentiate(OF_FEATURES[ill], (u @ turn * sigma) @ (v @ turn).T)
        assert close(plain, turned, 1e-10)
        weights = torch.diagonal(u.T @ plain @ v)
        assert close(plain, (u * weights) @ v.T, 1e-10)
        assert weights[:2].std() + weights[3:].std() < 1e-10 * weights.norm()

    @pytest.mark.parametrize("function", [r_ill, r_ill_of_features])
    @pytest.mark.parametrize("shape", [(5, 5), (7, 4), (3, 8), (1, 4), (4, 1)])
    def test_kappa_1_has_infinite_r_ill_with_gradient_0_although_rounding_splits_the_tie(self, function, shape):
        for seed in range(5):
            s = reference.matrix(*shape, torch.full((min(shape),), 3.0, dtype=torch.float64), seed)
            value, gradient = differentiate(function, s)
            assert value == math.inf
            assert not gradient.any()

    @pytest.mark.parametrize("function", [r_well, r_well_of_features])
    def test_kappa_1_has_r_well_0_with_gradient_0(self, function):
        value, gradient = differentiate(function, rotation(5, 0))
        assert 0 <= value < 1e-14
        assert gradient.norm() < 1e-13


class TestExtremes:
    @pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2), (1, 3)])
    def test_zero(self, shape):
        for well, ill in ((r_well, r_ill), (r_well_of_features, r_ill_of_features)):
            for function, expected in ((well, 0.0), (ill, math.inf)):
                value, gradient = differentiate(function, torch.zeros(shape, dtype=torch.float64))
                assert value == expected
                assert not gradient.any()

    @ILL
    @pytest.mark.parametrize("function", ["matrix", "features"])
    def test_null_directions_are_not_touched(self, ill, function):
        """A constant column beside its copy, and an unused one: rank 3 of 5."""
        x = normal(9, 5)
        x[:, 2], x[:, 3], x[:, 4] = 1.0, 1.0, 0.0
        _, gradient = differentiate((OF_MATRIX if function == "matrix" else OF_FEATURES)[ill], x)
        assert gradient.norm() > 0
        assert gradient[:, 4].norm() < 1e-12 * gradient.norm()
        assert (gradient[:, 2] - gradient[:, 3]).norm() < 1e-10 * gradient.norm()

    @ILL
    def test_fewer_samples_than_features_cost_and_give_the_same(self, ill):
        z = normal(4, 30)
        value, gradient = differentiate(OF_FEATURES[ill], z)
        h = z.T @ z
        assert value == pytest.approx((reference.r_ill if ill else reference.r_well)(h).item(), rel=1e-10)
        assert close(gradient, 2 * z @ GRADIENT[ill](h), 1e-10)

    @ILL
    @pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
    def test_scale_goes_out_as_it_came_in(self, ill, exponent):
        """R_well(c S) = c^2 R_well(S), R_ill(c S) = R_ill(S) / c^2; exactly so for powers of 2."""
        s, c = normal(5, 4), 2.0**exponent
        power = -2 if ill else 2
        value, gradient = differentiate(OF_MATRIX[ill], s)
        scaled, of_scaled = differentiate(OF_MATRIX[ill], c * s)
        assert scaled == pytest.approx((value * c**power).item(), rel=1e-12)
        assert close(of_scaled, gradient * c ** (power - 1), 1e-12)

    @pytest.mark.parametrize("function", [r_well, r_ill, r_well_of_features, r_ill_of_features])
    def test_what_is_no_finite_matrix_is_refused(self, function):
        for bad in (math.nan, math.inf):
            s = torch.eye(3, dtype=torch.float64)
            s[0, 1] = bad
            with pytest.raises(HoldfastError, match="not finite"):
                function(s)
        for shape in ((3,), (0, 3), (3, 0), (2, 2, 2)):
            with pytest.raises(HoldfastError, match="expected a matrix"):
                function(torch.ones(shape))

    @pytest.mark.parametrize("function", [r_well, r_ill, r_well_of_features, r_ill_of_features])
    def test_single_precision_stays_single(self, function):
        s = normal(6, 4)
        value, gradient = differentiate(function, s.float())
        exact, of_exact = differentiate(function, s)
        assert value.dtype == gradient.dtype == torch.float32
        assert value == pytest.approx(exact.item(), rel=1e-3)
        assert close(gradient.double(), of_exact, 1e-3)


def settings_of_layers() -> st.SearchStrategy[tuple[int, int, int, float, int]]:
    return st.tuples(
        st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1e-3, 0.1, 1.0]), st.integers(0, 1000)
    )


class TestPreconditioner:
    @DRAWN
    @given(settings_of_layers())
    def test_solves_and_pulls_back_as_a_dense_solve_does(self, case):
        rows, width, out, ridge, seed = case
        x, g, upstream = normal(rows, width, seed=seed), normal(width, out, seed=1), normal(rows, out, seed=2)
        k = x.T @ x + ridge * torch.eye(width, dtype=torch.float64)
        made = Preconditioner(x, ridge)
        assert close(made.solve(g), torch.linalg.solve(k, g))
        assert close(made.pull_back(upstream), torch.linalg.solve(k, x.T @ upstream), 1e-7)

    @DRAWN
    @given(st.integers(1, 6), st.integers(0, 5), st.floats(0, 12), st.integers(0, 1000))
    def test_without_a_ridge_it_is_the_pseudo_inverse_even_for_kappa_1e12(self, width, more, log_kappa, seed):
        sigma = torch.logspace(0, -log_kappa / 2, width, dtype=torch.float64)
        x = reference.matrix(width + more, width, sigma, seed)
        found = Preconditioner(x, ridge=0.0).pull_back(torch.eye(len(x), dtype=torch.float64))
        assert close(found, torch.linalg.pinv(x), 1e-14 * 10 ** (log_kappa / 2) + 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        "x", [normal(3, 5), normal(9, 2) @ normal(2, 4), torch.ones(5, 2).double(), torch.zeros(3, 3).double()]
    )
    def test_a_singular_k_without_a_ridge_is_refused(self, x, dtype):
        with pytest.raises(HoldfastError, match="singular"):
            Preconditioner(x.to(dtype), ridge=0.0)
        assert Preconditioner(x.to(dtype), ridge=1.0).solve(torch.ones(x.shape[1], 1, dtype=dtype)).isfinite().all()

    @pytest.mark.parametrize("ridge", [-1e-9, math.nan, math.inf])
    def test_a_senseless_ridge_is_refused(self, ridge):
        with pytest.raises(HoldfastError, match=f"ridge is {ridge}"):
            Preconditioner(torch.eye(2), ridge)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize(("rows", "ridge"), [(2, 1.0), (4, 1.0), (4, 0.0)])
    def test_inputs_that_are_not_finite_are_named_with_their_place(self, bad, rows, ridge):
        x = torch.ones(rows, 3)
        x[1, 0] = bad
        with pytest.raises(HoldfastError, match=r"inputs: not finite at row 1, column 0"):
            Preconditioner(x, ridge)


class TestPreconditionedLinear:
    @DRAWN
    @given(settings_of_layers())
    def test_the_gradient_of_theta_is_k_inverse_times_the_ordinary_one_and_that_of_x_is_ordinary(self, case):
        rows, width, out, ridge, seed = case
        x, theta, target = normal(rows, width, seed=seed), normal(width, out, seed=1), normal(rows, out, seed=2)
        gradients = []
        for preconditioned in (False, True):
            of_x = x.clone().requires_grad_()
            layer = PreconditionedLinear(theta)
            z = layer(of_x, Preconditioner(of_x, ridge) if preconditioned else None)
            assert torch.equal(z, x @ theta)
            ((z - target) ** 3).sum().backward()
            gradients.append((of_x.grad, layer.theta.grad))
        ordinary, found = gradients
        k = x.T @ x + ridge * torch.eye(width, dtype=torch.float64)
        assert torch.equal(found[0], ordinary[0])
        assert close(found[1], torch.linalg.solve(k, ordinary[1]), 1e-7)
        assert close(ordinary[1], x.T @ (3 * (x @ theta - target) ** 2), 1e-10)

    @pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
    def test_gradcheck_by_x_and_without_a_preconditioner_by_theta(self, shape):
        x, theta = normal(*shape).requires_grad_(), normal(shape[1], 4, seed=1)
        layer = PreconditionedLinear(theta).requires_grad_(False)
        assert torch.autograd.gradcheck(layer, x)
        assert torch.autograd.gradcheck(lambda x: layer(x, Preconditioner(x, 1.0)), x)

        def by_theta(theta):
            plain = PreconditionedLinear(theta.detach())
            del plain.theta
            plain.theta = theta
            return plain(x.detach())

        assert torch.autograd.gradcheck(by_theta, theta.requires_grad_())

    @ILL
    @DRAWN
    @given(case=settings_of_layers())
    def test_one_backward_pass_is_the_direction_of_algorithm_1(self, ill, case):
        rows, width, out, ridge, seed = case
        x, theta = normal(rows, width, seed=seed), normal(width, out, seed=1)
        assume(spectrum(x @ theta).rank > 1)
        layer = PreconditionedLinear(theta)
        OF_FEATURES[ill](layer(x, Preconditioner(x, ridge))).backward()
        k = x.T @ x
        dense = torch.linalg.solve(
            k + ridge * torch.eye(width, dtype=torch.float64), reference.gradient_by_theta(theta, k, ill=ill)
        )
        assert close(layer.theta.grad, dense, 1e-7)
        assert close(layer.theta.grad, reference.preconditioned(x, theta, ridge=ridge, ill=ill), 1e-7)

    @pytest.mark.trains
    @pytest.mark.parametrize("rows", [5, 40])
    def test_a_step_of_algorithm_1_line_6_by_an_optimizer_equals_the_naive_one(self, rows):
        """Batches of fewer and of more samples than features, a square and a wide extractor."""
        for out in (8, 11):
            theta, omega = normal(8, out), normal(out, 2, seed=1)
            benign, restricted, y = normal(rows, 8, seed=2), normal(rows + 1, 8, seed=3), normal(rows, 2, seed=4)
            layer = PreconditionedLinear(theta)
            optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
            loss = (layer(benign) @ omega - y).square().sum()
            well = r_well_of_features(layer(benign, Preconditioner(benign, 1.0)))
            ill = r_ill_of_features(layer(restricted, Preconditioner(restricted, 0.5)))
            (loss + 0.1 * well + 1e5 * ill).backward()
            optimizer.step()
            expected = reference.algorithm_1_line_6(
                theta,
                2 * benign.T @ (benign @ theta @ omega - y) @ omega.T,
                benign,
                restricted,
                rate=1e-3,
                weights=(0.1, 1e5),
                ridges=(1.0, 0.5),
            )
            assert (layer.theta - expected).norm() <= 1e-8 * (expected - theta).norm()

    def test_a_preconditioner_of_other_inputs_is_refused(self):
        x = torch.eye(2)
        with pytest.raises(HoldfastError, match="other inputs"):
            PreconditionedLinear(torch.eye(2))(x, Preconditioner(x.clone()))

    def test_theta_is_a_copy(self):
        theta = torch.eye(2)
        layer = PreconditionedLinear(theta)
        with torch.no_grad():
            layer.theta.zero_()
        assert torch.equal(theta, torch.eye(2))
