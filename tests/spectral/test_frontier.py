from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import reference
from holdfast.errors import HoldfastError
from holdfast.spectral.frontier import Frontier, angles, explained
from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.rir import Ratios, published_ratio, relative_immunization_ratio

DRAWN = settings(deadline=None, max_examples=60)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(rows: int, width: int, log_kappa: float, seed: int, rank: int | None = None) -> Tensor:
    """Data whose Gram matrix has kappa 10**log_kappa over its non-zero spectrum."""
    rank = rank or width
    half = log_kappa / 2 if rank > 1 else 0.0
    return reference.matrix(rows, width, torch.logspace(0, -half, rank, dtype=torch.float64), seed)


@st.composite
def pairs(draw: st.DrawFn, max_log_kappa: float) -> tuple[Tensor, Tensor]:
    """Benign and restricted data with as many columns, both of full column rank."""
    width, seed = draw(st.integers(2, 6)), draw(st.integers(0, 2**32))
    kappas = st.floats(0, max_log_kappa)
    benign = features(width + draw(st.integers(0, 9)), width, draw(kappas), seed)
    return benign, features(width + draw(st.integers(0, 9)), width, draw(kappas), seed + 1)


@st.composite
def related(draw: st.DrawFn, amount: float) -> tuple[Tensor, Tensor, float, float]:
    """A pair with known kappa(K_P), up to 1e12, and kappa(M): K_H = K_P^(1/2) M K_P^(1/2).

    Behind the stretch the restricted Hessian has kappa(M) kappa(K_P)^amount. It is kept below 1e22: float64 gives
    three digits of it up to about 1e24, and loses the direction of the smallest eigenvalue as rounding beyond 1e28.
    """
    width, seed = draw(st.integers(2, 6)), draw(st.integers(0, 2**32))
    log_p = draw(st.floats(0, 12))
    log_m = draw(st.floats(0, min(12.0, 22 - max(1.0, amount) * log_p)))
    benign = features(width + draw(st.integers(0, 5)), width, log_p, seed)
    _, sigma, v = reference.compact_svd(benign)
    return benign, features(width + 3, width, log_m, seed + 1) @ (v * sigma) @ v.T, 10**log_p, 10**log_m


def of(benign: Tensor, restricted: Tensor, y: Tensor | None = None, z: Tensor | None = None, **space) -> Frontier:
    return Frontier.of(LeastSquares.of(benign, y), LeastSquares.of(restricted, z), **space)


def ratios(frontier: Frontier, theta: Tensor) -> Ratios:
    return relative_immunization_ratio(theta, frontier.benign, frontier.restricted)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * max(a.norm(), b.norm()))


class TestRatio:
    @DRAWN
    @given(pairs(max_log_kappa=6), st.integers(1, 9), st.integers(0, 1000))
    def test_equals_equation_15_for_extractors_of_any_width(self, pair, out, seed):
        benign, restricted = pair
        theta = normal(benign.shape[1], out, seed=seed)
        found = relative_immunization_ratio(theta, LeastSquares.of(benign), LeastSquares.of(restricted))
        one, two = reference.immunization_ratio(theta, benign, restricted)
        assert found.restricted == pytest.approx(one, rel=1e-7)
        assert found.benign == pytest.approx(two, rel=1e-7)
        assert found.rir == pytest.approx(one / two, rel=1e-6)

    @DRAWN
    @given(pairs(max_log_kappa=6), st.floats(1e-3, 1e3), st.integers(0, 1000))
    def test_scaled_rotations_change_nothing(self, pair, scale, seed):
        benign, restricted = pair
        width = benign.shape[1]
        theta = scale * reference.matrix(width, width, torch.ones(width, dtype=torch.float64), seed)
        found = relative_immunization_ratio(theta, LeastSquares.of(benign), LeastSquares.of(restricted))
        assert (found.restricted, found.benign) == pytest.approx((1, 1), rel=1e-8)

    def test_immunized_needs_both_conditions(self):
        assert Ratios(2.0, 1.0).immunized
        assert not Ratios(2.0, 1.01).immunized
        assert not Ratios(0.5, 0.01).immunized
        assert Ratios(0.5, 0.01).rir == 50

    def test_an_extractor_that_loses_a_whole_task_is_refused(self):
        x = torch.eye(3)
        for theta in (torch.zeros(3, 3), torch.diag(torch.tensor([0.0, 0.0, 1.0]))):
            with pytest.raises(HoldfastError, match="maps all features of a task to zero"):
                relative_immunization_ratio(theta, LeastSquares.of(x[:2]), LeastSquares.of(x))

    def test_the_published_ratio_adds_its_floor_to_each_hessian(self):
        benign, restricted, theta = normal(9, 3), normal(8, 3, seed=1), normal(3, 3, seed=2)

        def kappa(x: Tensor) -> float:
            values = torch.linalg.eigvalsh(x.T @ x) + 1e-6
            return (values[-1] / values[0]).item()

        found = published_ratio(theta, benign, restricted)
        assert found.restricted == pytest.approx(kappa(restricted @ theta) / kappa(restricted), rel=1e-8)
        assert found.benign == pytest.approx(kappa(benign @ theta) / kappa(benign), rel=1e-8)


class TestBound:
    @DRAWN
    @given(pairs(max_log_kappa=4), st.data())
    def test_no_extractor_exceeds_it(self, pair, data):
        """Square, wide, tall and of low rank; random ones, and those beside the optimum."""
        frontier = of(*pair)
        width, seed = pair[0].shape[1], data.draw(st.integers(0, 1000))
        theta = normal(width, data.draw(st.integers(1, 9)), seed=seed)
        beside = frontier.stretch(data.draw(st.floats(0, 1.5))) @ (
            torch.eye(width, dtype=torch.float64) + data.draw(st.floats(0, 1)) * normal(width, width, seed=seed + 1)
        )
        low = normal(width, 2, seed=seed) @ normal(2, width, seed=seed + 1)
        for extractor in (theta, beside, low, frontier.stretch() @ theta):
            assert ratios(frontier, extractor).rir <= frontier.bound * (1 + 1e-6)

    @DRAWN
    @given(pairs(max_log_kappa=12), st.integers(1, 9), st.integers(0, 1000))
    def test_nor_where_kappa_is_up_to_1e12(self, pair, out, seed):
        frontier = of(*pair)
        assert ratios(frontier, normal(pair[0].shape[1], out, seed=seed)).rir <= frontier.bound * (1 + 1e-3)

    @DRAWN
    @given(pairs(max_log_kappa=6))
    def test_is_the_generalised_eigenvalues_of_both_grams(self, pair):
        benign, restricted = pair
        frontier = of(benign, restricted)
        chol = torch.linalg.cholesky(benign.T @ benign)
        half = torch.linalg.solve_triangular(chol, restricted.T, upper=False)
        mu = torch.linalg.svdvals(half).square()
        assert torch.allclose(frontier.mu, mu[: len(frontier.mu)], rtol=1e-4)
        kappa = reference.kappa(benign) ** 2 / reference.kappa(restricted) ** 2
        assert frontier.bound == pytest.approx((mu[0] / mu[-1]).item() * kappa, rel=1e-4)

    @DRAWN
    @given(related(amount=1.0))
    def test_finds_kappa_of_m_where_it_is_known(self, case):
        benign, restricted, _, kappa_m = case
        assert of(benign, restricted).kappa_m == pytest.approx(kappa_m, rel=1e-3)

    @DRAWN
    @given(pairs(max_log_kappa=6))
    def test_lies_between_1_and_the_product_of_both_kappas_squared(self, pair):
        frontier = of(*pair)
        assert frontier.bound >= 1 - 1e-9
        assert frontier.kappa_m <= frontier.benign.condition * frontier.restricted.condition * (1 + 1e-6)

    def test_does_not_know_units_in_which_features_are_given_together(self):
        """K -> A'KA for both changes M by a rotation only; kappa of the tasks changes, kappa(M) does not."""
        benign, restricted, a = normal(9, 4), normal(9, 4, seed=1), normal(4, 4, seed=2)
        assert of(benign @ a, restricted @ a).kappa_m == pytest.approx(of(benign, restricted).kappa_m, rel=1e-9)

    @pytest.mark.parametrize("log_kappa", [0.0, 6.0, 12.0])
    def test_the_same_task_twice_cannot_be_told_apart(self, log_kappa):
        x = features(9, 4, log_kappa, 0)
        frontier = of(x, 3 * x)
        assert frontier.bound == pytest.approx(1, rel=1e-7)
        for amount in (0.0, 0.5, 1.0):
            found = ratios(frontier, frontier.stretch(amount))
            assert found.rir == pytest.approx(1, rel=1e-3)
            assert found.benign == pytest.approx(10 ** (log_kappa * (amount - 1)), rel=1e-3)


class TestStretch:
    @DRAWN
    @given(st.data(), st.floats(0, 1.5), st.booleans())
    def test_reaches_the_bound_with_the_benign_kappa_that_was_asked_for(self, data, amount, rotate):
        benign, restricted, kappa_p, _ = data.draw(related(amount))
        frontier = of(benign, restricted)
        found = ratios(frontier, frontier.stretch(amount, rotate=rotate))
        assert found.rir == pytest.approx(frontier.bound, rel=1e-3)
        assert found.benign == pytest.approx(kappa_p ** (amount - 1), rel=1e-3)

    @DRAWN
    @given(related(amount=1.0), st.booleans())
    def test_1_is_the_optimum_of_definition_3_1_up_to_kappa_1e12(self, case, rotate):
        frontier = of(*case[:2])
        found = ratios(frontier, frontier.stretch(rotate=rotate))
        assert found.restricted >= 0.999 * frontier.bound
        assert found.benign <= 1.001

    @DRAWN
    @given(pairs(max_log_kappa=8))
    def test_so_it_is_for_tasks_that_have_nothing_to_do_with_each_other(self, pair):
        frontier = of(*pair)
        found = ratios(frontier, frontier.stretch())
        assert found.restricted >= 0.999 * frontier.bound
        assert found.benign <= 1.001

    @DRAWN
    @given(related(amount=0.0))
    def test_0_whitens_the_benign_task(self, case):
        benign, restricted, kappa_p, _ = case
        frontier = of(benign, restricted)
        white = benign @ frontier.stretch(0.0)
        assert close(
            white.T @ white, torch.eye(benign.shape[1], dtype=torch.float64), 1e-12 * math.sqrt(kappa_p) + 1e-9
        )
        assert frontier.benign.through(frontier.whitening).condition == pytest.approx(1, rel=1e-3)

    @DRAWN
    @given(pairs(max_log_kappa=4), st.floats(0, 1.5))
    def test_rotation_of_the_output_is_all_that_rotate_changes(self, pair, amount):
        frontier = of(*pair)
        rotated, aligned = frontier.stretch(amount), frontier.stretch(amount, rotate=False)
        turn = torch.linalg.solve(rotated, aligned)
        assert close(turn @ turn.T, torch.eye(len(turn), dtype=torch.float64), 1e-5)
        hessian = frontier.restricted.through(aligned).gram
        assert close(hessian, torch.diag(hessian.diagonal()), 1e-6)

    @pytest.mark.parametrize("amount", [-0.1, math.nan, math.inf])
    def test_a_senseless_amount_is_refused(self, amount):
        with pytest.raises(HoldfastError, match=f"stretch is {amount}"):
            of(torch.eye(2), torch.eye(2)).stretch(amount)

    def test_rir_alone_cannot_tell_it_from_whitening(self):
        frontier = of(features(9, 4, 6, 0), features(9, 4, 3, 1))
        white, stretched = (ratios(frontier, frontier.stretch(amount)) for amount in (0.0, 1.0))
        assert white.rir == pytest.approx(stretched.rir, rel=1e-6)
        assert stretched.restricted > 1e5 * white.restricted


@st.composite
def labelled(draw: st.DrawFn, max_log_kappa: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    benign, restricted = draw(pairs(max_log_kappa))
    y = normal(len(benign), draw(st.integers(1, 3)), seed=draw(st.integers(0, 1000)))
    return benign, restricted, y, normal(len(restricted), 2, seed=1)


class TestSignalFrontier:
    @DRAWN
    @given(labelled(max_log_kappa=8), st.floats(-5, 0))
    def test_one_step_of_gradient_descent_of_size_1_solves_the_benign_task_for_every_epsilon(self, case, exponent):
        benign, restricted, y, _ = case
        theta = of(benign, restricted, y).protect_signal(10**exponent)
        z = benign @ theta
        w = torch.zeros(theta.shape[1], y.shape[1], dtype=torch.float64)
        w = w - 1.0 * z.T @ (z @ w - y)
        best = benign @ (torch.linalg.pinv(benign) @ y)
        assert (z @ w - best).norm() <= 1e-9 * reference.kappa(benign) * y.norm()

    @DRAWN
    @given(labelled(max_log_kappa=4), st.floats(-4, 0), st.booleans())
    def test_benign_eigenvalues_are_1_on_the_signal_and_epsilon_squared_elsewhere(self, case, exponent, rotate):
        benign, restricted, y, _ = case
        theta = of(benign, restricted, y).protect_signal(10**exponent, rotate=rotate)
        found = torch.linalg.svdvals(benign @ theta)
        signal, rank = min(y.shape[1], benign.shape[1]), benign.shape[1]
        expected = torch.tensor([1.0] * signal + [10**exponent] * (rank - signal), dtype=torch.float64)
        assert torch.allclose(found, expected, rtol=1e-6)

    @DRAWN
    @given(labelled(max_log_kappa=12))
    def test_the_default_epsilon_keeps_the_benign_kappa(self, case):
        benign, restricted, y, _ = case
        frontier = of(benign, restricted, y)
        found = ratios(frontier, frontier.protect_signal())
        if y.shape[1] < benign.shape[1]:
            assert found.benign == pytest.approx(1, rel=1e-3)
        else:
            assert found.benign == pytest.approx(1 / frontier.benign.condition, rel=1e-3)  # all is signal: whitening

    @DRAWN
    @given(labelled(max_log_kappa=4))
    def test_never_above_the_bound(self, case):
        benign, restricted, y, _ = case
        frontier = of(benign, restricted, y)
        for epsilon in (1e-3, 0.1, 1.0):
            assert ratios(frontier, frontier.protect_signal(epsilon)).rir <= frontier.bound * (1 + 1e-6)

    @DRAWN
    @given(labelled(max_log_kappa=4))
    def test_the_leak_is_what_the_signal_alone_explains_of_the_restricted_labels(self, case):
        benign, restricted, y, z = case
        frontier = of(benign, restricted, y, z)
        # The signal in coordinates of the features: K_P^-1 X_P'Y.
        probe = restricted @ (torch.linalg.pinv(benign) @ y)
        part = z - probe @ (torch.linalg.pinv(probe) @ z)
        whole = z - restricted @ (torch.linalg.pinv(restricted) @ z)
        energy = z.square().sum()
        expected = (energy - part.square().sum()) / (energy - whole.square().sum())
        assert frontier.leak() == pytest.approx(expected.item(), rel=1e-6)
        assert 0 <= frontier.leak() <= 1 + 1e-9

    def test_without_restricted_labels_the_leak_is_unknown(self):
        assert math.isnan(of(normal(5, 3), normal(5, 3, seed=1), normal(5, 1, seed=2)).leak())

    def test_collinear_targets_are_one_direction(self):
        y = normal(9, 1)
        assert of(normal(9, 4, seed=1), normal(9, 4, seed=2), torch.cat([y, -2 * y, 0 * y], 1)).signal.shape == (4, 1)

    @pytest.mark.parametrize("epsilon", [0.0, -1.0, 1.1, math.nan])
    def test_a_senseless_epsilon_is_refused(self, epsilon):
        with pytest.raises(HoldfastError, match=f"epsilon is {epsilon}"):
            of(torch.eye(2), torch.eye(2), torch.ones(2)).protect_signal(epsilon)

    @pytest.mark.parametrize("y", [None, torch.zeros(3, 2), torch.tensor([0.0, 0.0, 1.0])])
    def test_no_signal_is_refused(self, y):
        x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        with pytest.raises(HoldfastError, match="no signal"):
            of(x, x, y).protect_signal()


class TestFull:
    @DRAWN
    @given(st.integers(3, 7), st.data())
    def test_is_invertible_and_theta_on_the_common_subspace(self, width, data):
        ranks = [data.draw(st.integers(width // 2 + 1, width)) for _ in range(2)]
        benign, restricted = (features(width + 4, width, 3, i, rank) for i, rank in enumerate(ranks))
        frontier = of(benign, restricted)
        theta = frontier.stretch()
        full = frontier.full(theta)
        assert full.shape == (width, width)
        inside = torch.linalg.svdvals(theta)
        singular = torch.linalg.svdvals(full)
        assert singular[-1] >= inside[-1] * (1 - 1e-9)
        assert singular[0] <= inside[0] * (1 + 1e-9)
        assert close(frontier.basis.T @ full @ frontier.basis, theta, 1e-9)
        found = relative_immunization_ratio(
            full @ frontier.basis,
            frontier.benign.through(frontier.basis.T),
            frontier.restricted.through(frontier.basis.T),
        )
        assert found.restricted == pytest.approx(frontier.bound, rel=1e-3)
        assert found.benign == pytest.approx(1, rel=1e-3)

    @DRAWN
    @given(pairs(max_log_kappa=4), st.integers(1, 3), st.booleans())
    def test_folding_its_inverse_into_the_head_leaves_predictions_unchanged(self, pair, classes, rotate):
        benign, restricted = pair
        frontier = of(benign, restricted, normal(len(benign), 1))
        head = normal(benign.shape[1], classes, seed=1)
        for theta in (frontier.stretch(rotate=rotate), frontier.protect_signal(rotate=rotate)):
            full = frontier.full(theta)
            folded = torch.linalg.solve(full, head)
            assert close(benign @ full @ folded, benign @ head, 1e-6)

    def test_a_scaled_rotation_stays_one_outside(self):
        """Theta of one scale: the rest gets the same."""
        x = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
        frontier = of(x, x)
        full = frontier.full(5.0 * torch.eye(2, dtype=torch.float64))
        assert close(full, 5.0 * torch.eye(3, dtype=torch.float64), 1e-12)


class TestSpaces:
    def test_common_leaves_what_one_task_never_uses_out_of_account(self):
        """The benign task never uses column 2, the restricted one is tiny there: no ratio may see it."""
        benign = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
        restricted = torch.diag(torch.tensor([2.0, 1.0, 1e-9]))
        frontier = of(benign, restricted)
        assert frontier.basis.shape == (3, 2)
        assert frontier.bound == pytest.approx(16)
        assert frontier.restricted.condition == pytest.approx(4)

    @DRAWN
    @given(st.integers(2, 6), st.floats(1e-3, 1), st.integers(0, 1000))
    def test_ridge_is_everything_with_the_ridge_in_both_grams(self, width, ridge, seed):
        benign, restricted = normal(width - 1, width, seed=seed), normal(width + 3, width, seed=seed + 1)
        frontier = of(benign, restricted, space="ridge", ridge=ridge)
        assert torch.equal(frontier.basis, torch.eye(width, dtype=torch.float64))
        for task, x in ((frontier.benign, benign), (frontier.restricted, restricted)):
            assert close(task.gram, x.T @ x + ridge * len(x) * torch.eye(width, dtype=torch.float64), 1e-10)
        found = ratios(frontier, frontier.stretch())
        assert found.restricted == pytest.approx(frontier.bound, rel=1e-6)
        assert found.benign == pytest.approx(1, rel=1e-6)

    def test_targets_and_samples_survive_the_restriction_to_the_subspace(self):
        benign, y = features(9, 4, 2, 0, rank=3), normal(9, 2)
        frontier = of(benign, normal(9, 4, seed=1), y)
        assert frontier.benign.samples == 9
        inside = benign @ frontier.basis
        best = inside @ (torch.linalg.pinv(inside) @ y)
        assert explained(frontier.benign) == pytest.approx(best.square().sum().item(), rel=1e-9)
        assert explained(frontier.benign) <= explained(LeastSquares.of(benign, y)) + 1e-9
        energy = frontier.benign.target.square().sum().item() + frontier.benign.rest
        assert energy == pytest.approx(y.square().sum().item(), rel=1e-9)

    def test_one_row_each_have_nothing_to_stretch(self):
        x = torch.tensor([[3.0, 4.0]])
        frontier = of(x, 2 * x)
        assert frontier.basis.shape == (2, 1)
        assert frontier.bound == 1
        assert ratios(frontier, frontier.stretch()) == Ratios(1.0, 1.0)
        assert torch.linalg.matrix_rank(frontier.full(frontier.stretch())) == 2

    def test_disjoint_supports_and_different_widths_are_refused(self):
        x = torch.eye(4)
        with pytest.raises(HoldfastError, match="disjoint supports"):
            of(x[:2], x[2:])
        assert of(x[:2], x[2:], space="ridge").bound > 1
        with pytest.raises(HoldfastError, match="4 and 2 features"):
            of(x, torch.eye(2))

    @pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan, math.inf])
    def test_a_senseless_ridge_is_refused(self, ridge):
        with pytest.raises(HoldfastError, match=f"ridge is {ridge}"):
            of(torch.eye(2), torch.eye(2), space="ridge", ridge=ridge)

    def test_an_unknown_space_is_refused_with_the_known_ones(self):
        with pytest.raises(HoldfastError, match="did you mean 'common'"):
            of(torch.eye(2), torch.eye(2), space="comon")


class TestAngles:
    @DRAWN
    @given(pairs(max_log_kappa=4))
    def test_are_the_cosines_of_the_singular_vectors(self, pair):
        found = angles(LeastSquares.of(pair[0]), LeastSquares.of(pair[1]))
        width = pair[0].shape[1]
        assert found.shape == (width, width)
        assert found.min() >= 0
        assert found.max() <= 1
        ones = torch.ones(width, dtype=torch.float64)
        assert torch.allclose(found.square().sum(0), ones)  # rows of an orthogonal matrix
        assert torch.allclose(found.square().sum(1), ones)

    def test_the_identity_for_a_task_with_itself_yet_immunization_may_be_possible(self):
        """Aligned vectors with other values: the paper calls this impossible, the bound says by how much it is not."""
        v = reference.matrix(4, 4, torch.ones(4, dtype=torch.float64), 0)
        benign = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)) @ v.T
        restricted = torch.diag(torch.tensor([8.0, 7.0, 6.0, 5.0], dtype=torch.float64)) @ v.T
        assert torch.allclose(
            angles(LeastSquares.of(benign), LeastSquares.of(restricted)), torch.eye(4, dtype=torch.float64), atol=1e-9
        )
        assert of(benign, restricted).bound == pytest.approx((5 / 1) ** 2 * 8**2 / 1.6**2)
        assert of(benign, 3 * benign).bound == pytest.approx(1)

    def test_only_the_spectrum_counts(self):
        assert angles(LeastSquares.of(features(9, 5, 2, 0, rank=2)), LeastSquares.of(normal(3, 5))).shape == (2, 3)


class TestProposition32:
    """Eq. 10 gives the diagonal of V'HV: H's spectrum only where theta's left singular vectors diagonalise K."""

    @DRAWN
    @given(st.integers(2, 6), st.floats(0, 4), st.floats(0, 3), st.integers(0, 1000))
    def test_holds_where_theta_is_aligned_with_k(self, width, log_k, log_theta, seed):
        x = features(width + 2, width, log_k, seed)
        _, _, q = torch.linalg.svd(x, full_matrices=False)
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        scales = torch.logspace(0, -log_theta - 0.1 * width, width, dtype=torch.float64)
        right = reference.matrix(width, width, torch.ones(width, dtype=torch.float64), seed + 1)
        theta = (q.T[:, order] * scales) @ right
        printed = reference.proposition_3_2(theta, x.T @ x).sort(descending=True).values
        true = torch.linalg.svdvals(x @ theta).square()
        assert torch.allclose(printed, true, rtol=1e-6, atol=1e-12 * true[0].item())

    @DRAWN
    @given(st.integers(2, 6), st.floats(0, 4), st.integers(0, 1000))
    def test_is_majorised_by_the_spectrum_always(self, width, log_kappa, seed):
        """Schur-Horn: equal sums, and no partial sum of the largest exceeds that of the eigenvalues."""
        x, theta = features(width + 2, width, log_kappa, seed), normal(width, width, seed=seed)
        printed = reference.proposition_3_2(theta, x.T @ x).sort(descending=True).values.cumsum(0)
        true = torch.linalg.svdvals(x @ theta).square().cumsum(0)
        assert printed[-1] == pytest.approx(true[-1].item(), rel=1e-9)
        assert (printed <= true * (1 + 1e-9)).all()

    def test_fails_for_a_theta_at_45_degrees(self):
        k = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        u = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
        theta = u * torch.tensor([2.0, 1.0], dtype=torch.float64)
        printed = reference.proposition_3_2(theta, k)
        true = torch.linalg.eigvalsh(theta.T @ k @ theta).flip(0)
        assert printed.tolist() == pytest.approx([10.0, 2.5])
        root = math.sqrt(7.5**2 / 4 + 9)
        assert true.tolist() == pytest.approx([6.25 + root, 6.25 - root])
        kappa = LeastSquares.of(k.sqrt()).through(theta).condition
        assert kappa == pytest.approx((6.25 + root) / (6.25 - root))  # 7.6, where the printed formula says 4
        assert kappa > 1.9 * printed[0] / printed[1]


def test_losing_a_benign_direction_is_no_immunization():
    """kappa counts non-zero singular values only: an extractor that kills the slowest direction must not profit."""
    benign = LeastSquares.of(torch.diag(torch.tensor([9.0, 3.0, 1.0])))
    restricted = LeastSquares.of(torch.diag(torch.tensor([1.0, 3.0, 1.0])))
    ratios = relative_immunization_ratio(
        torch.diag(torch.tensor([1.0, 9.0, 0.0], dtype=torch.float64)), benign, restricted
    )
    assert ratios.restricted > 1
    assert ratios.benign < 1
    assert ratios.lost == 1
    assert not ratios.immunized
