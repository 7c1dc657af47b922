from __future__ import annotations

import math
from itertools import islice, pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import reference
from holdfast.errors import HoldfastError
from holdfast.spectral.convergence import descend, measured_tau, norm_ratios, predicted_tau
from holdfast.spectral.frontier import Frontier
from holdfast.spectral.least_squares import LeastSquares

DRAWN = settings(deadline=None, max_examples=40)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def probes(draw: st.DrawFn, max_log_kappa: float = 2.0) -> tuple[Tensor, Tensor]:
    """Features of any shape and rank, and targets."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    rank = draw(st.integers(1, min(rows, columns)))
    half = draw(st.floats(0, max_log_kappa)) / 2 if rank > 1 else 0.0
    sigma = draw(st.sampled_from([1e-3, 1.0, 50.0])) * torch.logspace(0, -half, rank, dtype=torch.float64)
    seed = draw(st.integers(0, 2**32))
    return reference.matrix(rows, columns, sigma, seed), normal(rows, draw(st.integers(1, 3)), seed=seed + 1)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


SHARES = st.sampled_from([0.1, 0.5, 0.9, 0.99])


class TestTau:
    @DRAWN
    @given(probes(), SHARES)
    def test_predicted_equals_what_the_loop_takes(self, case, q):
        x, y = case
        problem = LeastSquares.of(x, y)
        predicted = predicted_tau(problem, q)
        assert predicted == reference.tau(x, y, q, steps=2000)
        assert predicted == measured_tau(problem, q, max_steps=2000)

    @DRAWN
    @given(probes(), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
    def test_knows_no_units_of_features_or_targets(self, case, of_x, of_y):
        x, y = case
        assert predicted_tau(LeastSquares.of(of_x * x, of_y * y)) == predicted_tau(LeastSquares.of(x, y))

    @DRAWN
    @given(probes(max_log_kappa=10), st.floats(0.05, 0.9), st.floats(0.01, 0.09))
    def test_a_larger_share_never_takes_fewer_steps(self, case, q, more):
        problem = LeastSquares.of(*case)
        assert predicted_tau(problem, q) <= predicted_tau(problem, q + more)

    @DRAWN
    @given(probes(max_log_kappa=10), SHARES)
    def test_kappa_bounds_it_from_above(self, case, q):
        """Convergence by Eq. 2's kind of bound: the loss falls by (1 - 1/kappa)^(2t) at least."""
        problem = LeastSquares.of(*case)
        if problem.spectrum.rank > 1 and problem.condition > 1 + 1e-6:
            worst = math.log(1 - q) / (2 * math.log1p(-1 / problem.condition))
            assert 1 <= predicted_tau(problem, q) <= math.ceil(worst * (1 + 1e-6))
        else:
            assert predicted_tau(problem, q) == 1

    @pytest.mark.parametrize("log_kappa", [2, 6, 12, 14])
    def test_labels_in_the_slow_direction_pay_for_kappa_and_those_in_the_fast_one_do_not(self, log_kappa):
        x = diagonal(1.0, 10 ** (-log_kappa / 2))
        fast, slow = (predicted_tau(LeastSquares.of(x, y)) for y in torch.eye(2, dtype=torch.float64))
        assert fast == 1
        assert slow == pytest.approx(math.log(0.1) / (2 * math.log1p(-(10.0**-log_kappa))), rel=1e-6, abs=1)

    def test_the_first_step_counts_as_one_even_if_little_was_wanted(self):
        problem = LeastSquares.of(diagonal(1.0, 0.5), torch.tensor([1.0, 0.0]))
        assert predicted_tau(problem, 1e-6) == measured_tau(problem, 1e-6) == 1

    def test_beyond_all_patience_it_is_infinite(self):
        problem = LeastSquares.of(diagonal(1.0, 1e-8), torch.tensor([0.0, 1.0]))
        assert predicted_tau(problem) == math.inf
        assert measured_tau(problem, max_steps=5) is None

    def test_gives_up_after_the_steps_that_it_may_take_and_not_before(self):
        problem = LeastSquares.of(diagonal(1.0, 0.1), torch.tensor([0.0, 1.0]))
        assert measured_tau(problem, max_steps=115) == 115 == predicted_tau(problem)
        assert measured_tau(problem, max_steps=114) is None

    @pytest.mark.parametrize("x", [torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])])
    def test_what_nothing_can_be_learned_from_has_none(self, x):
        for y in (torch.zeros(3), None):
            assert math.isnan(predicted_tau(LeastSquares.of(x, y)))
        assert math.isnan(predicted_tau(LeastSquares.of(torch.zeros(3, 2), torch.ones(3))))

    @pytest.mark.parametrize("q", [0.0, 1.0, -0.5, 1.5, math.nan])
    @pytest.mark.parametrize("function", [predicted_tau, measured_tau])
    def test_a_senseless_share_is_refused(self, function, q):
        with pytest.raises(HoldfastError, match=f"q is {q}"):
            function(LeastSquares.of(torch.eye(2), torch.ones(2)), q)

    def test_the_signal_frontier_holds_up_the_restricted_task_and_speeds_up_the_benign_one(self):
        """Restricted labels outside the benign signal wait for about 1/epsilon^2 steps, the benign ones for one."""
        x, y, z = normal(40, 6), normal(40, 1, seed=1), normal(40, 1, seed=2)
        frontier = Frontier.of(LeastSquares.of(x, y), LeastSquares.of(x, z))
        waits = []
        for epsilon in (1e-2, 1e-3):
            theta = frontier.protect_signal(epsilon)
            assert predicted_tau(frontier.benign.through(theta)) == 1
            waits.append(predicted_tau(frontier.restricted.through(theta)) * epsilon**2)
        assert waits[0] == pytest.approx(waits[1], rel=0.01)
        assert 0.1 < waits[0] < 10


class TestDescend:
    @DRAWN
    @given(probes(), st.booleans())
    def test_walks_the_path_of_the_data_themselves(self, case, line_search):
        x, y = case
        found = islice(descend(LeastSquares.of(x, y), line_search=line_search), 8)
        scale = torch.linalg.pinv(x).norm() * y.norm()
        steps = reference.probe_path(x, y, 7, line_search=line_search)
        for w, slow in zip(found, steps, strict=True):
            if not slow.isfinite().all():
                break  # the twin has arrived: 0 / 0
            assert (w - slow).norm() <= 1e-7 * scale

    @DRAWN
    @given(probes(max_log_kappa=6), st.integers(0, 100))
    def test_the_line_search_minimises_the_loss_along_each_step(self, case, seed):
        x, y = case
        start = normal(x.shape[1], y.shape[1], seed=seed)
        before, after = islice(descend(LeastSquares.of(x, y), line_search=True, start=start), 2)

        def loss(w: Tensor) -> float:
            return (x @ w - y).square().sum().item()

        for share in (0.0, 0.5, 0.99, 1.01, 1.5):
            assert loss(after) <= loss(before + share * (after - before)) * (1 + 1e-12) + 1e-15

    @DRAWN
    @given(probes(max_log_kappa=6))
    def test_a_constant_step_converges_at_the_rate_of_kappa(self, case):
        x, y = case
        problem = LeastSquares.of(x, y)
        best = torch.linalg.pinv(x, rtol=1e-9) @ y
        rate = 1 - 1 / problem.condition
        for t, w in enumerate(islice(descend(problem), 20)):
            assert (w - best).norm() <= (rate**t + 1e-9) * best.norm()

    def test_never_leaves_the_solution(self):
        x, y = normal(6, 3), normal(6, 2, seed=1)
        best = torch.linalg.lstsq(x, y).solution
        for line_search in (False, True):
            *_, last = islice(descend(LeastSquares.of(x, y), line_search=line_search, start=best), 50)
            assert torch.allclose(last, best, rtol=1e-9)

    def test_zero_features_leave_the_probe_where_it_is(self):
        for line_search in (False, True):
            steps = islice(descend(LeastSquares.of(torch.zeros(3, 2), torch.ones(3)), line_search=line_search), 3)
            assert all(not w.any() for w in steps)


class TestNormRatios:
    @DRAWN
    @given(probes(max_log_kappa=4))
    def test_start_at_1_equal_equation_16_and_never_rise(self, case):
        x, y = case
        found = norm_ratios(LeastSquares.of(x, y), 12)
        assert len(found) == 13
        assert found[0] == 1
        # Down to rounding: after arrival the twin is 0 / 0.
        for fast, slow in zip(found, reference.norm_ratios(x, y, 12), strict=True):
            if slow < 1e-12 or math.isnan(slow):
                break
            assert fast == pytest.approx(slow, rel=1e-5, abs=1e-12)
        assert all(b <= a + 1e-12 for a, b in pairwise(found))

    def test_perfect_conditioning_arrives_in_one_step(self):
        x = reference.matrix(9, 4, torch.full((4,), 3.0, dtype=torch.float64), 0)
        assert norm_ratios(LeastSquares.of(x, normal(9, 2)), 3)[1] < 1e-25

    def test_fall_more_slowly_where_kappa_is_larger(self):
        y = normal(9, 1)
        ends = [
            norm_ratios(LeastSquares.of(reference.matrix(9, 4, torch.logspace(0, -h, 4).double(), 0), y), 50)[-1]
            for h in (0.2, 1.0, 2.0)
        ]
        assert ends == sorted(ends)
        assert ends[0] < 1e-6 < ends[1] < ends[2]

    def test_null_directions_are_no_part_of_the_solution(self):
        """Duplicate columns: the solution of least norm is reached from 0, others would not be."""
        x = normal(20, 3)
        doubled = norm_ratios(LeastSquares.of(torch.cat([x, x], 1), normal(20, 1, seed=1)), 200)
        assert doubled[-1] < 1e-12

    def test_the_floor_is_that_of_the_hessian(self):
        """As in the released code: 1e-6 on the diagonal, not per sample."""
        x, y = normal(30, 3), normal(30, 1, seed=1)
        augmented = torch.cat([x, math.sqrt(0.7) * torch.eye(3, dtype=torch.float64)])
        expected = reference.norm_ratios(augmented, torch.cat([y, y.new_zeros(3, 1)]), 6)
        assert norm_ratios(LeastSquares.of(x, y), 6, floor=0.7) == pytest.approx(expected, rel=1e-6)

    def test_nothing_to_learn_has_no_ratio(self):
        for x, y in ((torch.eye(2), torch.zeros(2)), (torch.zeros(2, 2), torch.ones(2))):
            assert all(math.isnan(ratio) for ratio in norm_ratios(LeastSquares.of(x, y), 2))
