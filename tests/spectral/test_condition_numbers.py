from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import reference
from holdfast.errors import HoldfastError
from holdfast.spectral.condition_numbers import (
    EPS,
    condition_number,
    extreme_pairs,
    gram_spectrum,
    published_condition_number,
    spectrum,
)
from holdfast.spectral.least_squares import LeastSquares, common_subspace

DRAWN = settings(deadline=None, max_examples=50)
METHODS = ("qr", "gram")


@st.composite
def matrices(draw: st.DrawFn, max_log_kappa: float = 12.0) -> tuple[Tensor, Tensor]:
    """Features of any shape and rank, and their non-zero singular values; the Hessian's kappa is up to 1e12."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    rank = draw(st.integers(1, min(rows, columns)))
    half = draw(st.floats(0, max_log_kappa)) / 2 if rank > 1 else 0.0
    sigma = torch.logspace(0, -half, rank, dtype=torch.float64) * 10 ** draw(st.floats(-6, 6))
    return reference.matrix(rows, columns, sigma, draw(st.integers(0, 2**32))), sigma


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    """Agreement relative to the size of the whole."""
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * max(a.norm(), b.norm()))


class TestSpectrum:
    @DRAWN
    @given(matrices())
    def test_values_rank_and_kappa_are_those_that_the_matrix_was_made_of(self, case):
        x, sigma = case
        found = spectrum(x)
        kappa = (sigma[0] / sigma[-1]).item()
        assert found.rank == len(sigma)
        assert found.size == min(x.shape)
        assert torch.allclose(found.values, sigma, rtol=0, atol=1e-14 * sigma[0].item())
        assert found.condition == pytest.approx(kappa, rel=1e-14 * kappa + 1e-13)
        assert found.hessian_condition == pytest.approx(kappa**2, rel=3e-14 * kappa + 1e-12)
        assert condition_number(x) == pytest.approx(reference.kappa(x), rel=1e-14 * kappa + 1e-13)

    @DRAWN
    @given(matrices(), st.integers(-30, 30))
    def test_kappa_knows_neither_scale_nor_transposition(self, case, exponent):
        x, sigma = case
        tolerance = 1e-14 * (sigma[0] / sigma[-1]).item() + 1e-13
        assert spectrum(x.T).rank == spectrum(x * 2.0**exponent).rank == len(sigma)
        assert spectrum(x.T).condition == pytest.approx(spectrum(x).condition, rel=tolerance)
        assert spectrum(x * 2.0**exponent).condition == pytest.approx(spectrum(x).condition, rel=1e-12)

    def test_a_value_counts_just_above_the_tolerance_and_not_below(self):
        tolerance = 5 * EPS * 3.0
        x = torch.zeros(5, 2, dtype=torch.float64)
        x[0, 0] = 3.0
        for factor, rank in ((1.01, 2), (0.99, 1)):
            x[1, 1] = factor * tolerance
            assert spectrum(x).rank == rank
        assert spectrum(x).tolerance == tolerance

    def test_a_root_is_judged_by_the_samples_behind_it(self):
        root = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))
        assert spectrum(root).rank == 2
        assert spectrum(root, samples=10**5).rank == 1

    @pytest.mark.parametrize("shape", [(30, 5), (3, 5), (5, 5)])
    def test_duplicate_columns_have_no_direction_of_their_own(self, shape):
        x = normal(*shape)
        assert spectrum(torch.cat([x, x], 1)).rank == min(shape)
        assert spectrum(torch.cat([x, x], 1)).condition == pytest.approx(condition_number(x))

    def test_constant_columns_count_once(self):
        x = torch.cat([normal(20, 3), torch.full((20, 2), 7.0, dtype=torch.float64), torch.zeros(20, 1)], 1)
        assert spectrum(x).rank == 4
        assert spectrum(x - x.mean(0)).rank == 3

    def test_one_row_has_kappa_1(self):
        found = spectrum(torch.tensor([[3.0, 4.0, 0.0]]))
        assert (found.rank, found.condition) == (1, 1.0)
        assert found.values.tolist() == pytest.approx([5.0])

    def test_zero_has_rank_0_and_no_kappa(self):
        found = spectrum(torch.zeros(4, 3))
        assert found.rank == 0
        assert math.isnan(found.condition)
        assert math.isnan(found.hessian_condition)

    def test_single_precision_is_decomposed_in_double(self):
        x = normal(6, 3).float()
        assert torch.equal(spectrum(x).values, spectrum(x.double()).values)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        ("call", "what"),
        [
            (spectrum, "matrix"),
            (condition_number, "matrix"),
            (LeastSquares.of, "features"),
            (extreme_pairs, "features"),
            (gram_spectrum, "Gram"),
            (published_condition_number, "Gram"),
            (lambda x: LeastSquares.of(torch.eye(3), x), "targets"),
            (lambda x: LeastSquares.stream([(torch.eye(3), None), (x, None)], method="gram"), "features"),
        ],
    )
    def test_a_value_that_is_not_finite_is_named_with_its_place(self, bad, call, what):
        x = torch.eye(3, dtype=torch.float64)
        x[1, 2] = bad
        with pytest.raises(HoldfastError, match=rf"{what}.*row 1, column 2 \({bad}\)"):
            call(x)

    def test_a_vector_is_refused_with_its_shape(self):
        with pytest.raises(HoldfastError, match=r"\(3,\)"):
            spectrum(torch.ones(3))


class TestGramSpectrum:
    @DRAWN
    @given(matrices(max_log_kappa=8))
    def test_agrees_with_the_features(self, case):
        x, sigma = case
        found = gram_spectrum(x.T @ x, samples=len(x))
        kappa = (sigma[0] / sigma[-1]).item()
        assert found.rank == len(sigma)
        assert torch.allclose(found.values, sigma, rtol=1e-14 * kappa**2 + 1e-13)

    def test_cannot_see_what_the_features_show(self):
        """The reason why roots are used: the Gram squares 1e-9 into the rounding of 1."""
        x = reference.matrix(4, 2, torch.tensor([1.0, 1e-9], dtype=torch.float64), 0)
        assert spectrum(x).condition == pytest.approx(1e9, rel=1e-5)
        assert gram_spectrum(x.T @ x, samples=4).rank == 1
        assert LeastSquares.stream([(x, None)], method="qr").spectrum.rank == 2
        assert LeastSquares.stream([(x, None)], method="gram").spectrum.rank == 1

    @pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
    @pytest.mark.parametrize("values", [[1.0, -1e-3], [-1.0, -2.0]])
    def test_negative_eigenvalues_are_refused_at_any_scale(self, values, scale):
        with pytest.raises(HoldfastError, match="positive semi-definite"):
            gram_spectrum(scale * torch.diag(torch.tensor(values, dtype=torch.float64)))

    @pytest.mark.parametrize(
        ("gram", "message"),
        [(torch.ones(2, 3), "square"), (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "symmetric")],
    )
    def test_what_is_no_gram_is_refused(self, gram, message):
        with pytest.raises(HoldfastError, match=message):
            gram_spectrum(gram)

    def test_zero_has_rank_0(self):
        assert gram_spectrum(torch.zeros(3, 3)).rank == 0


class TestPublishedConditionNumber:
    def test_adds_the_floor_and_keeps_what_is_above(self):
        gram = torch.diag(torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64))
        assert published_condition_number(gram) == (2.0 + 1e-6) / (0.5 + 1e-6)

    def test_rounding_noise_decides_whether_a_null_direction_counts(self):
        noisy = torch.diag(torch.tensor([1.0, 0.25, 1e-17], dtype=torch.float64))
        exact = torch.diag(torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))
        assert published_condition_number(noisy) == pytest.approx(1e6, rel=1e-5)
        assert published_condition_number(exact) == pytest.approx(4, rel=1e-5)
        assert gram_spectrum(noisy).condition == gram_spectrum(exact).condition == 2

    def test_zero_has_none(self):
        assert math.isnan(published_condition_number(torch.zeros(2, 2)))


class TestExtremePairs:
    @DRAWN
    @given(matrices(max_log_kappa=8))
    def test_are_singular_pairs_of_the_largest_and_smallest_value(self, case):
        x, sigma = case
        top, bottom, rank = extreme_pairs(x)
        kappa = (sigma[0] / sigma[-1]).item()
        assert rank == len(sigma)
        for pair, value in ((top, sigma[0]), (bottom, sigma[-1])):
            size = sigma[0].item()
            assert torch.allclose(pair.value, value, rtol=1e-14 * kappa**2 + 1e-13)
            assert torch.allclose(x @ pair.right, pair.value * pair.left, rtol=0, atol=1e-14 * kappa * size + 1e-14)
            assert torch.allclose(x.T @ pair.left, pair.value * pair.right, rtol=0, atol=1e-14 * kappa * size + 1e-14)
            assert pair.left.norm() == pytest.approx(1, rel=1e-14 * kappa**2 + 1e-13)
            assert pair.right.norm() == pytest.approx(1, rel=1e-14 * kappa**2 + 1e-13)

    def test_zero_is_refused(self):
        with pytest.raises(HoldfastError, match="All features are zero"):
            extreme_pairs(torch.zeros(3, 2, dtype=torch.float64))


class TestLeastSquares:
    @DRAWN
    @given(matrices(), st.integers(0, 3), st.integers(0, 1000))
    def test_keeps_gram_cross_and_energy(self, case, targets, seed):
        x, sigma = case
        y = normal(len(x), targets, seed=seed)
        problem = LeastSquares.of(x, y)
        assert problem.root.shape[0] <= problem.features == x.shape[1]
        assert problem.samples == len(x)
        assert close(problem.gram, x.T @ x)
        assert (problem.cross - x.T @ y).norm() <= 1e-13 * sigma[0] * max(y.norm(), 1)
        energy = problem.target.square().sum().item() + problem.rest
        assert energy == pytest.approx(y.square().sum().item(), rel=1e-12)
        assert problem.spectrum.rank == len(sigma)
        assert problem.condition == pytest.approx(spectrum(x).hessian_condition, rel=1e-6)

    @DRAWN
    @given(matrices())
    def test_svd_is_of_the_root_over_the_non_zero_spectrum(self, case):
        x, sigma = case
        u, s, v = LeastSquares.of(x).svd
        assert s.shape == sigma.shape
        assert close((u * s) @ v.T, LeastSquares.of(x).root)
        assert close(v @ v.T, torch.linalg.pinv(x, rtol=1e-9) @ x, 1e-13 * (sigma[0] / sigma[-1]).item() + 1e-12)

    @pytest.mark.parametrize("method", METHODS)
    @DRAWN
    @given(matrices(max_log_kappa=6), st.integers(0, 2), st.lists(st.integers(1, 5), max_size=12))
    def test_a_stream_in_batches_of_any_size_equals_the_whole(self, method, case, targets, sizes):
        x, sigma = case
        y = normal(len(x), targets)
        batches, at = [], 0
        for size in [*sizes, len(x)]:
            if at < len(x):
                batches.append((x[at : at + size], y[at : at + size]))
                at += size
        streamed, whole = LeastSquares.stream(batches, method=method), LeastSquares.of(x, y)
        assert streamed.samples == whole.samples
        assert close(streamed.gram, whole.gram)
        assert (streamed.cross - whole.cross).norm() <= 1e-13 * sigma[0] * max(y.norm(), 1)
        assert streamed.spectrum.rank == whole.spectrum.rank == len(sigma)
        assert torch.allclose(streamed.spectrum.values, whole.spectrum.values, rtol=1e-8)
        energy = streamed.target.square().sum().item() + streamed.rest
        assert energy == pytest.approx(y.square().sum().item(), rel=1e-8)

    @pytest.mark.parametrize("method", METHODS)
    def test_batches_of_one_equal_the_whole(self, method):
        x, y = normal(9, 4), normal(9, 2, seed=1)
        streamed = LeastSquares.stream(((x[i : i + 1], y[i : i + 1]) for i in range(9)), method=method)
        assert close(streamed.gram, x.T @ x)
        assert close(streamed.cross, x.T @ y)
        best = torch.linalg.lstsq(x, y).solution
        assert streamed.rest == pytest.approx((x @ best - y).square().sum().item(), rel=1e-10)

    def test_qr_streaming_keeps_digits_that_a_gram_loses(self):
        x = reference.matrix(50, 5, torch.logspace(0, -10, 5, dtype=torch.float64), 0)
        streamed = LeastSquares.stream((part, None) for part in x.split(7))
        assert streamed.condition == pytest.approx(1e20, rel=1e-4)

    def test_targets_may_be_a_vector_and_single_precision(self):
        x, y = normal(7, 3).float(), normal(7, seed=1).float()
        problem = LeastSquares.of(x, y)
        assert problem.root.dtype == problem.target.dtype == torch.float64
        assert close(problem.cross, x.double().T @ y.double()[:, None])

    def test_the_input_is_left_as_it_is_and_no_graph_is_kept(self):
        x = normal(5, 3).requires_grad_()
        before = x.detach().clone()
        for method in METHODS:
            assert not LeastSquares.stream([(x, None), (x, None)], method=method).root.requires_grad
        assert torch.equal(x, before)

    @pytest.mark.parametrize("method", METHODS)
    def test_zero_features_explain_nothing(self, method):
        problem = LeastSquares.stream([(torch.zeros(4, 3), torch.ones(4, 2))], method=method)
        assert problem.spectrum.rank == 0
        assert math.isnan(problem.condition)
        assert not problem.gram.any()
        assert not problem.cross.any()
        assert problem.target.square().sum() + problem.rest == pytest.approx(8)

    @DRAWN
    @given(matrices(max_log_kappa=4), st.integers(1, 9))
    def test_through_an_extractor_of_any_width_is_the_problem_on_its_features(self, case, width):
        x, _ = case
        theta, y = normal(x.shape[1], width), normal(len(x), 2, seed=1)
        behind, direct = LeastSquares.of(x, y).through(theta), LeastSquares.of(x @ theta, y)
        assert behind.features == width
        assert close(behind.gram, direct.gram)
        assert (behind.cross - direct.cross).norm() <= 1e-12 * (x.norm() * theta.norm() * y.norm())
        assert behind.spectrum.rank == direct.spectrum.rank
        assert torch.allclose(behind.spectrum.values, direct.spectrum.values, rtol=1e-8)

    @pytest.mark.parametrize("theta", [torch.eye(2), torch.ones(3), torch.eye(4)])
    def test_an_extractor_with_other_rows_is_refused(self, theta):
        with pytest.raises(HoldfastError, match=r"expected \(3, D_out\)"):
            LeastSquares.of(torch.eye(3)).through(theta)

    @DRAWN
    @given(matrices(max_log_kappa=6), st.floats(1e-6, 10))
    def test_a_ridge_is_rows_of_its_own(self, case, ridge):
        x, sigma = case
        y = normal(len(x), 2)
        found = LeastSquares.of(x, y).with_ridge(ridge)
        extra = math.sqrt(ridge * len(x)) * torch.eye(x.shape[1], dtype=torch.float64)
        same = LeastSquares.of(torch.cat([x, extra]), torch.cat([y, y.new_zeros(x.shape[1], 2)]))
        assert found.samples == len(x)
        assert close(found.gram, same.gram)
        assert (found.cross - x.T @ y).norm() <= 1e-13 * found.root.norm() * y.norm()
        assert found.target.square().sum().item() + found.rest == pytest.approx(y.square().sum().item(), rel=1e-10)
        assert found.rest == pytest.approx(same.rest, rel=1e-9, abs=1e-12)
        padded = torch.cat([sigma, sigma.new_zeros(x.shape[1] - len(sigma))])
        expected = (padded.square() + ridge * len(x)).sqrt()
        assert torch.allclose(torch.linalg.svdvals(found.root), expected, rtol=1e-10)

    def test_no_ridge_is_the_problem_itself(self):
        problem = LeastSquares.of(torch.eye(2))
        assert problem.with_ridge(0.0) is problem

    @pytest.mark.parametrize("ridge", [-1.0, math.nan, math.inf])
    def test_a_senseless_ridge_is_refused(self, ridge):
        with pytest.raises(HoldfastError, match=f"ridge is {ridge}"):
            LeastSquares.of(torch.eye(2)).with_ridge(ridge)

    @pytest.mark.parametrize("method", METHODS)
    def test_no_samples_are_refused(self, method):
        for batches in ([], [(torch.zeros(0, 2), None)]):
            with pytest.raises(HoldfastError, match="no samples"):
                LeastSquares.stream(batches, method=method)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ((torch.ones(2, 4), torch.ones(2, 1)), "has 4 features and those before it 3"),
            ((torch.ones(2, 3), torch.ones(2, 2)), "different numbers of targets"),
            ((torch.ones(2, 3), None), "different numbers of targets"),
            ((torch.ones(2, 3), torch.ones(3, 1)), "2 rows of features and 3 of targets"),
        ],
    )
    def test_batches_that_do_not_fit_together_are_refused(self, method, second, message):
        with pytest.raises(HoldfastError, match=message):
            LeastSquares.stream([(torch.ones(2, 3), torch.ones(2, 1)), second], method=method)


class TestCommonSubspace:
    @DRAWN
    @given(st.integers(2, 7), st.data(), st.integers(0, 1000))
    def test_is_orthonormal_and_used_by_both_with_the_dimension_of_a_generic_intersection(self, width, data, seed):
        ranks = [data.draw(st.integers(1, width)) for _ in range(2)]
        problems = []
        for i, rank in enumerate(ranks):
            sigma = torch.logspace(0, -data.draw(st.floats(0, 4)), rank, dtype=torch.float64)
            problems.append(LeastSquares.of(reference.matrix(width + 3, width, sigma, 2 * seed + i)))
        size = sum(ranks) - width
        if size < 1:
            with pytest.raises(HoldfastError, match="disjoint supports"):
                common_subspace(*problems)
            return
        basis = common_subspace(*problems)
        assert basis.shape == (width, size)
        assert close(basis.T @ basis, torch.eye(size, dtype=torch.float64))
        for problem in problems:
            _, _, v = problem.svd
            assert (basis - v @ (v.T @ basis)).norm() < 1e-6
            assert problem.through(basis).spectrum.rank == size
            assert problem.through(basis).condition <= problem.condition * (1 + 1e-6)

    def test_everything_where_both_have_full_rank(self):
        assert torch.equal(
            common_subspace(LeastSquares.of(normal(9, 4)), LeastSquares.of(normal(4, 4, seed=1))),
            torch.eye(4, dtype=torch.float64),
        )

    def test_the_same_null_space_is_counted_once(self):
        x, shared = normal(20, 3), normal(3, 6, seed=1)
        basis = common_subspace(LeastSquares.of(x @ shared), LeastSquares.of(normal(20, 3, seed=2) @ shared))
        assert basis.shape == (6, 3)

    def test_constant_and_unused_columns(self):
        x, other = normal(20, 4), normal(20, 4, seed=1)
        x[:, 1], other[:, 3] = 0, 0
        basis = common_subspace(LeastSquares.of(x), LeastSquares.of(other))
        assert basis.shape == (4, 2)
        assert basis[[1, 3]].abs().max() < 1e-12

    def test_disjoint_supports_are_refused(self):
        x = torch.eye(4)
        with pytest.raises(HoldfastError, match="disjoint supports"):
            common_subspace(LeastSquares.of(x[:2]), LeastSquares.of(x[2:]))
        with pytest.raises(HoldfastError, match="disjoint supports"):
            common_subspace(LeastSquares.of(x), LeastSquares.of(torch.zeros(3, 4)))

    def test_different_widths_are_refused(self):
        with pytest.raises(HoldfastError, match="3 and 2 features"):
            common_subspace(LeastSquares.of(torch.eye(3)), LeastSquares.of(torch.eye(2)))
