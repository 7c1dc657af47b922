from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from holdfast.auditing import statistics
from holdfast.auditing.statistics import Battery, Comparison, costs, halve
from holdfast.results import Curve
from reference import advantage_band, best_of_battery, mean_best, steps_to

ROLES = ("immunized", "original", "scratch")
BUDGETS = (0, 5, 10, 40)


def battery(scores, **settings):
    scores = np.asarray(scores, dtype=np.float64)
    return Battery(tuple(f"a{i}" for i in range(len(scores))), scores, **settings)


def compared(budgets=BUDGETS, seed=0, **roles):
    return Comparison({role: battery(scores) for role, scores in roles.items()}, budgets, seed)


def constant(curve, *, seeds=3, folds=8):
    """One adversary, the same with every seed and on every fold."""
    return np.broadcast_to(np.asarray(curve, dtype=np.float64)[:, None], (1, seeds, len(curve), folds)).copy()


@st.composite
def score_arrays(draw, *, count=1, least_seeds=1, least_folds=1):
    """Scores of some models, of one shape."""
    seeds, folds = draw(st.integers(least_seeds, 4)), draw(st.integers(least_folds, 9))
    shape = draw(st.integers(1, 4)), seeds, len(BUDGETS), folds
    # Sixteenths add up without rounding, so that ties are ties however a mean is taken.
    values = st.integers(0, 16).map(lambda n: n / 16)
    return [draw(arrays(np.float64, shape, elements=values)) for _ in range(count)]


class TestSelection:
    @settings(max_examples=40, deadline=None)
    @given(score_arrays(), st.booleans(), st.data())
    def test_equals_the_loops(self, scores, both_ways, data):
        own = scores[0]
        for a in range(len(own)):
            if data.draw(st.booleans()):  # not finite with one seed from some budget on
                own[a, data.draw(st.integers(0, own.shape[1] - 1)), data.draw(st.integers(0, 3)) :] = np.nan
        fast = battery(own, both_ways=both_ways).best
        slow = best_of_battery(own.tolist(), both_ways=both_ways)
        assert len(fast) == len(slow) == 1 + both_ways
        for one, two in zip(fast, slow, strict=True):
            # Means in another order may break ties otherwise; sixteenths of thirds are not exact.
            np.testing.assert_allclose(one, two, atol=1e-12)

    def test_a_hand_made_case(self):
        """Adversary 0 is better on even folds, 1 on odd ones: each is chosen where it is good and scored where not."""
        scores = np.zeros((2, 2, 1, 4))
        scores[0, ..., 0::2], scores[1, ..., 1::2] = 1.0, 1.0
        one = compared((5,), immunized=scores, scratch=scores)
        assert one.scores["immunized"].tolist() == [[0.0], [0.0]]

    def test_the_best_mean_over_seeds_not_the_mean_of_bests(self):
        """An attacker chooses before knowing the luck: a steady adversary is better than a lucky one."""
        scores = np.zeros((4, 3, 1, 4))
        scores[3] = 0.5
        for s in range(3):
            scores[s, s] = 0.9
        assert compared((5,), immunized=scores, scratch=scores).scores["immunized"].tolist() == [[0.5]] * 3

    def test_stopping_early_is_a_choice(self):
        one = compared(immunized=constant([0.1, 0.7, 0.4, 0.2]), scratch=constant([0.1, 0.1, 0.1, 0.1]))
        assert one.scores["immunized"].mean(0).tolist() == pytest.approx([0.1, 0.7, 0.7, 0.7])

    def test_a_search_is_scored_on_the_folds_that_it_did_not_see(self):
        scores = np.zeros((1, 2, 1, 6))
        scores[..., 0::2], scores[..., 1::2] = 0.9, 0.3
        seen = Comparison({"scratch": battery(scores, both_ways=False)}, (5,))
        assert seen.scores["scratch"].tolist() == [[pytest.approx(0.3)]] * 2

    @pytest.mark.parametrize("folds", [1, 2, 3, 4, 19, 20])
    def test_every_fold_is_in_one_half(self, folds):
        first, second = halve(folds)
        assert sorted({*first, *second}) == list(range(folds))
        assert folds == 1 or not {*first} & {*second}
        assert len(first) - len(second) in (0, 1)

    @settings(deadline=None, max_examples=40)
    @given(score_arrays())
    def test_never_above_the_best_adversary_of_each_sample(self, scores):
        own = scores[0]
        one = compared(immunized=own, scratch=own)
        highest = np.maximum.accumulate(own.max(0), 1)  # seeds, budgets, folds
        first, second = halve(own.shape[3])
        bound = (highest[..., first].mean(2) + highest[..., second].mean(2)) / 2
        assert (one.scores["immunized"] <= bound + 1e-12).all()

    @settings(deadline=None, max_examples=40)
    @given(score_arrays(), st.randoms(use_true_random=False))
    def test_order_of_seeds_is_nothing(self, scores, random):
        own, order = scores[0], list(range(scores[0].shape[1]))
        random.shuffle(order)
        before, after = (compared(immunized=x, scratch=x).scores["immunized"] for x in (own, own[:, order]))
        np.testing.assert_allclose(before[order], after, atol=1e-12)

    def test_order_of_adversaries_is_nothing(self):
        rng = np.random.default_rng(0)
        for _ in range(30):
            own = rng.random((5, 3, 4, 7))  # no ties
            order = rng.permutation(5)
            before, after = (compared(immunized=x, scratch=x) for x in (own, own[order]))
            np.testing.assert_allclose(before.scores["immunized"], after.scores["immunized"], atol=1e-12)

    @settings(deadline=None, max_examples=40)
    @given(score_arrays())
    def test_a_worse_adversary_changes_nothing(self, scores):
        own = scores[0]
        more = np.concatenate([own, own.min(0, keepdims=True) - 0.1])
        before, after = (compared(immunized=x, scratch=x).scores["immunized"] for x in (own, more))
        np.testing.assert_array_equal(before, after)


class TestNotFinite:
    def test_the_adversary_is_left_out(self):
        wild = constant([0.9, 0.9, 0.9, 0.9])
        wild[0, 1, 2:] = np.nan  # with one seed, from the third budget on
        both = np.concatenate([wild, constant([0.1, 0.2, 0.3, 0.4])])
        assert compared(immunized=both, scratch=both).scores["immunized"].tolist() == [[pytest.approx(0.9)] * 4] * 3
        later = constant([0.1, 0.2, 0.9, 0.9])
        later[0, 1, 2:] = np.nan
        both = np.concatenate([later, constant([0.1, 0.2, 0.3, 0.4])])
        found = compared(immunized=both, scratch=both).scores["immunized"]
        np.testing.assert_allclose(found, [[0.1, 0.2, 0.3, 0.4]] * 3)

    def test_none_finite_is_none(self):
        lost = np.full((2, 3, 4, 8), np.nan)
        had, fresh = constant([0.1, 0.5, 0.6, 0.7]), constant([0.1, 0.2, 0.3, 0.4])
        one = compared(immunized=lost, original=had, scratch=fresh)
        for row in one.rows():
            assert row.best["immunized"].mean is row.advantage is row.interval is None
            assert row.best_adversary["immunized"] == "none finite"
        assert [row.original_advantage for row in one.rows()] == pytest.approx([0, 0.3, 0.3, 0.3])
        assert all(row.original_interval is not None for row in one.rows()[1:])
        assert one.share() == (None, None)
        assert one.area("immunized") is None
        assert {c.role: c.steps for c in costs(one, 0.5, {"a0": 1, "a1": 1}, {})} == {
            "immunized": None, "original": 5, "scratch": None,
        }  # fmt: skip

    def test_nothing_finite_before_some_budget(self):
        late = constant([np.nan, np.nan, 0.5, 0.6])
        one = compared(immunized=late, original=late, scratch=constant([0.1, 0.2, 0.3, 0.4]))
        assert [row.advantage for row in one.rows()] == [None, None, pytest.approx(0.2), pytest.approx(0.2)]
        assert {row.interval for row in one.rows()} == {None}


class TestBand:
    @pytest.mark.parametrize(("seeds", "folds"), [(2, 4), (3, 5), (5, 20)])
    def test_equals_the_loops(self, seeds, folds, monkeypatch):
        monkeypatch.setattr(statistics, "REPLICATES", 20)
        rng = np.random.default_rng(seeds)
        own, other = (rng.random((3, seeds, len(BUDGETS), folds)) for _ in range(2))
        one = compared((1, 2, 3, 4), 7, immunized=own, scratch=other)
        slow = [best_of_battery(x.tolist()) for x in (own, other)]
        band = [(i.low, i.high) for i in one.band("immunized")]
        np.testing.assert_allclose(band, advantage_band(*slow, 7, 20), rtol=1e-9)
        np.testing.assert_allclose(
            one.advantage("immunized"), np.subtract(*(mean_best(h) for h in slow)), atol=1e-12
        )  # fmt: skip

    @settings(deadline=None, max_examples=15)
    @given(score_arrays(least_seeds=2, least_folds=4))
    def test_a_model_against_itself_has_no_advantage_for_certain(self, scores):
        one = compared(immunized=scores[0], scratch=scores[0].copy())
        assert one.advantage("immunized").tolist() == [0.0] * len(BUDGETS)
        assert [(i.low, i.high) for i in one.band("immunized")[1:]] == [(0.0, 0.0)] * (len(BUDGETS) - 1)

    @settings(deadline=None, max_examples=15)
    @given(score_arrays(count=2, least_seeds=2, least_folds=4))
    def test_it_is_around_the_advantage_and_the_same_twice(self, scores):
        first, second = (compared(immunized=scores[0], scratch=scores[1]) for _ in range(2))
        assert first.band("immunized") == second.band("immunized")
        for centre, found in zip(first.advantage("immunized"), first.band("immunized"), strict=True):
            assert found is None or (found.low + found.high) / 2 == pytest.approx(centre, abs=1e-12)

    @pytest.mark.parametrize(("seeds", "folds", "told"), [(1, 20, False), (2, 3, False), (2, 1, False), (2, 4, True)])
    def test_one_value_has_no_spread(self, seeds, folds, told):
        rng = np.random.default_rng(0)
        roles = {role: rng.random((2, seeds, len(BUDGETS), folds)) + 10 * (role == "original") for role in ROLES}
        one = compared(**roles)
        assert one.band("immunized")[0] is None  # nothing was done there
        assert all((found is not None) == told for found in one.band("immunized")[1:])
        assert np.isfinite(one.advantage("immunized")).all()
        share, interval = one.share()
        assert share is not None
        assert (interval is not None) == told

    def test_what_all_models_share_cancels(self):
        """Harder samples and better seeds move all roles alike: pairing keeps them out of the band."""
        rng = np.random.default_rng(0)
        shared = rng.normal(size=(1, 5, 1, 20)) + rng.normal(size=(1, 5, 1, 1))
        one = compared((0, 5), immunized=constant([0, 0.3], seeds=5, folds=20) + shared,
                       scratch=constant([0, 0.2], seeds=5, folds=20) + shared)  # fmt: skip
        found = one.band("immunized")[1]
        assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))

    def test_two_budgets_are_enough(self):
        rng = np.random.default_rng(0)
        one = compared((0, 5), **{role: rng.random((2, 3, 2, 6)) for role in ROLES})
        assert len(one.rows()) == 2
        assert one.rows()[1].interval.low < one.rows()[1].advantage < one.rows()[1].interval.high
        assert one.area("immunized") is None  # a mean over steps needs two

    @settings(deadline=None, max_examples=15)
    @given(score_arrays(count=2, least_seeds=2, least_folds=4), st.sampled_from([0.25, 2.0]))
    def test_it_scales_with_the_scores(self, scores, factor):
        """By powers of two, which round nothing: other sums may break ties in another way."""
        one, two = (compared(immunized=f * scores[0], scratch=f * scores[1]) for f in (1.0, factor))
        widths = [np.array([i.high - i.low for i in c.band("immunized")[1:]]) for c in (one, two)]
        np.testing.assert_allclose(widths[0] * factor, widths[1], atol=1e-9)

    def test_rounding_is_no_spread(self):
        """A budget at which nothing varies but the last digit does not widen the band at the others."""
        rng = np.random.default_rng(0)
        scores = constant([0, 0.3], seeds=5, folds=20)
        scores[:, :, 1] += rng.normal(size=(5, 20))
        still = np.concatenate([scores[:, :, :1], scores[:, :, :1], scores[:, :, :1], scores[:, :, 1:]], 2)
        noisy = still.copy()
        noisy[:, :, :3] += 1e-16 * rng.normal(size=(1, 5, 3, 20))
        bands = [compared((0, 5, 6, 7), immunized=x, scratch=0 * x).band("immunized")[-1] for x in (still, noisy)]
        assert bands[0].high == pytest.approx(bands[1].high, abs=1e-12)


class TestNoise:
    """What the method is for: adversaries that differ by nothing but luck."""

    REPETITIONS = 200

    @staticmethod
    def draw(rng, spread, *, seeds=4, adversaries=30):
        return 0.5 + spread * rng.normal(size=(adversaries, seeds, 1, 20))

    def test_the_best_of_many_is_unbiased_and_the_maximum_is_not(self):
        rng = np.random.default_rng(0)
        fair, naive = [], []
        for _ in range(self.REPETITIONS):
            scores = self.draw(rng, 0.2)
            fair.append(compared((5,), scratch=scores).scores["scratch"].mean())
            naive.append(scores.mean((1, 3)).max())
        error = np.std(fair) / math.sqrt(self.REPETITIONS)
        assert abs(np.mean(fair) - 0.5) < 3 * error
        assert np.mean(naive) - 0.5 > 10 * error

    def test_a_steadier_model_is_not_called_worse(self):
        """The more scores vary, the more a maximum gains: it would take scratch's luck for a higher mark."""
        rng = np.random.default_rng(1)
        found, naive = [], []
        for _ in range(self.REPETITIONS):
            steady, lucky = self.draw(rng, 0.05), self.draw(rng, 0.3)
            found.append(compared((5,), immunized=steady, scratch=lucky).advantage("immunized")[0])
            naive.append(steady.mean((1, 3)).max() - lucky.mean((1, 3)).max())
        error = np.std(found) / math.sqrt(self.REPETITIONS)
        assert abs(np.mean(found)) < 3 * error
        assert np.mean(naive) < -10 * error


class TestCoverage:
    """Audits drawn from a known truth; docs/statistics.md has the same with more repetitions."""

    REPETITIONS = 200

    @pytest.mark.parametrize("seeds", [3, 5, 10])
    def test_the_band_holds_the_truth_at_all_budgets_at_once(self, seeds):
        held = share_held = shares = 0
        for i in range(self.REPETITIONS):
            scores, truth = synthetic(np.random.default_rng((i, seeds)), seeds=seeds)
            one = compared((0, 5, 10, 20, 50), i, **scores)
            inside = [b.low <= t <= b.high for b, t in zip(one.band("immunized")[1:], truth["immunized"], strict=True)]
            held += all(inside)
            interval = one.share()[1]
            if interval is not None:
                shares += 1
                share_held += interval.low <= sum(truth["immunized"]) / sum(truth["original"]) <= interval.high
        # 95 % of 200, less two standard errors of such a count
        assert held >= 0.92 * self.REPETITIONS
        assert shares > 0.7 * self.REPETITIONS
        assert share_held >= 0.92 * shares

    @pytest.mark.parametrize("seeds", [3, 10])
    def test_so_does_the_band_of_a_look_with_more_confidence(self, seeds):
        held = 0
        for i in range(self.REPETITIONS):
            scores, truth = synthetic(np.random.default_rng((i, seeds)), seeds=seeds)
            batteries = {role: battery(scores[role]) for role in ("immunized", "scratch")}
            one = Comparison(batteries, (0, 5, 10, 20, 50), i, confidence=0.99)
            held += all(
                b.low <= t <= b.high for b, t in zip(one.band("immunized")[1:], truth["immunized"], strict=True)
            )
        # 99 % of 200, less three standard errors of such a count
        assert held >= 0.97 * self.REPETITIONS


def synthetic(rng, *, seeds, adversaries=8, folds=20, gap=0.01):
    """Scores of three models that share seeds and test samples, and their true advantages at budgets above 0.

    Adversaries are `gap` apart. Luck of seeds: 3 points shared, 3 of scratch's own weights, 1 of the others', 3 or 1.5
    of each adversary. Of the test split: 3 points shared, 2 of each model, 1.2 of each adversary, 1.2 of each score.
    """
    rise = np.array([0, 0.3, 0.5, 0.7, 1.0])
    gains = {"immunized": 0.05, "original": 0.2, "scratch": 0.0}

    def noise(spread, *shape):
        return spread * rng.normal(size=shape) * (math.sqrt(folds) if shape[-1] > 1 else 1)

    shared = noise(0.03, 1, seeds, 1, 1) + noise(0.03, 1, 1, 1, folds)
    scores = {}
    for role, gain in gains.items():
        own, each = (0.03, 0.03) if role == "scratch" else (0.01, 0.015)
        means = 0.2 + (0.4 + gain - gap * np.arange(adversaries)[:, None]) * rise
        scores[role] = (
            means[:, None, :, None] + shared
            + noise(own, 1, seeds, 1, 1) + noise(0.7 * each, adversaries, seeds, 1, 1)
            + noise(0.7 * each, adversaries, seeds, len(rise), 1)
            + noise(0.02, 1, 1, 1, folds) + noise(0.012, adversaries, 1, 1, folds)
            + noise(0.012, adversaries, seeds, len(rise), folds)
        )  # fmt: skip
    return scores, {role: (gain * rise[1:]).tolist() for role, gain in gains.items()}


class TestShare:
    def test_the_part_of_the_advantage_that_is_left(self):
        one = compared(
            immunized=constant([0.1, 0.4, 0.4, 0.4]), original=constant([0.2, 0.8, 0.9, 0.9]),
            scratch=constant([0.1, 0.3, 0.5, 0.5]),
        )  # fmt: skip
        share, interval = one.share()
        assert share == pytest.approx(0.1 / (0.5 + 0.4 + 0.4))  # below scratch does not count against it
        assert (interval.low, interval.high) == (pytest.approx(share), pytest.approx(share))

    def test_of_the_original_is_all(self):
        rng = np.random.default_rng(0)
        had = rng.random((2, 3, 4, 8)) + 1
        share, interval = compared(immunized=had, original=had, scratch=rng.random((2, 3, 4, 8))).share()
        assert (share, interval.low, interval.high) == (1.0, 1.0, 1.0)

    def test_of_nothing_is_none(self):
        same = constant([0.1, 0.3, 0.5, 0.5])
        assert compared(immunized=same, original=same, scratch=same).share() == (None, None)

    def test_no_interval_where_replicates_have_nothing_to_divide_by(self):
        rng = np.random.default_rng(0)
        noise = {role: 0.5 + 0.3 * rng.normal(size=(1, 3, 4, 8)) for role in ROLES}
        noise["original"] += 0.02
        share, interval = compared(**noise).share()
        assert share is not None
        assert interval is None


class TestFloor:
    """An error has no end: a budget at which no adversary has learned anything must not outweigh the others."""

    ROLES = {  # noqa: RUF012
        "scratch": [-4.0, -3.0, -1.0, 0.3],
        "original": [0.0, 0.40, 0.45, 0.5],
        "immunized": [-4.0, -3.0, -1.0, 0.49],
    }

    def made(self, floor):
        roles = {role: battery(constant(scores)) for role, scores in self.ROLES.items()}
        return Comparison(roles, BUDGETS, floor=floor)

    def test_what_sums_over_budgets_counts_lower_scores_as_the_floor(self):
        assert self.made(-np.inf).share()[0] == pytest.approx(0.19 / (3.4 + 1.45 + 0.2))
        share, interval = self.made(0.0).share()
        assert share == pytest.approx(0.19 / (0.4 + 0.45 + 0.2))
        assert (interval.low, interval.high) == pytest.approx((share, share))
        assert self.made(0.0).area("original") == pytest.approx((5 * 0.425 + 30 * 0.325) / 35)

    def test_each_budget_is_as_it_is(self):
        rows = self.made(0.0).rows()
        assert rows[1].original_advantage == pytest.approx(3.4)
        assert rows[1].best["scratch"].mean == -3.0

    def test_scores_above_it_are_left_alone(self):
        scores = {role: np.random.default_rng(i).uniform(0.2, 1, (2, 3, 4, 8)) for i, role in enumerate(self.ROLES)}
        plain, floored = (
            Comparison({r: battery(s) for r, s in scores.items()}, BUDGETS, floor=floor) for floor in (-np.inf, -9.0)
        )
        assert plain.share() == floored.share()
        assert plain.area("immunized") == floored.area("immunized")


class TestArea:
    def test_by_hand(self):
        one = compared(immunized=constant([0.9, 0.2, 0.4, 0.4]), scratch=constant([0.0, 0.1, 0.1, 0.1]))
        # the running best begins at 0.9 before the first step, where the budget does not count but the choice does
        assert one.area("immunized") == pytest.approx(0.8)
        one = compared(immunized=constant([0.0, 0.2, 0.4, 0.4]), scratch=constant([0.0, 0.1, 0.1, 0.1]))
        assert one.area("immunized") == pytest.approx((5 * (0.1 + 0.3) / 2 + 30 * 0.3) / 35)


class TestCosts:
    def test_by_hand(self):
        scores = {"immunized": [[0.1, 0.2, 0.4, 0.4], [0.1, 0.1, 0.1, 0.5]], "scratch": [[0.3, 0.1, 0.1, 0.2]] * 2}
        one = compared(**{role: np.concatenate([constant(c) for c in curves]) for role, curves in scores.items()})
        found = {c.role: c for c in costs(one, 0.3, {"a0": 50, "a1": 1}, {"a0": 1e6, "a1": None})}
        own = found["immunized"]
        assert (own.steps, own.adversary) == (pytest.approx(7.5), "a0")  # halfway from 5 to 10 steps
        assert own.samples == pytest.approx(25)  # the other one: halfway from 10 to 40 steps, one sample each
        assert own.flops == pytest.approx(7.5e6)
        assert (found["scratch"].steps, found["scratch"].samples) == (0, 0)  # there before the first step

    def test_never_reached(self):
        one = compared(immunized=constant([0.1, 0.2, 0.4, 0.4]))
        found = costs(one, 0.41, {"a0": 50}, {"a0": 1.0})[0]
        assert found.steps is found.samples is found.flops is found.adversary is None

    def test_after_what_was_not_finite(self):
        one = compared(immunized=constant([0.1, np.nan, 0.4, 0.4]))
        assert costs(one, 0.3, {"a0": 1}, {})[0].steps == 10

    @given(st.lists(st.integers(0, 20), min_size=4, max_size=4), st.integers(0, 20))
    def test_equals_the_walk(self, values, target):
        curve = [v / 20 for v in values]
        found = costs(compared(immunized=constant(curve)), target / 20 - 1e-9, {"a0": 1}, {})[0].steps
        walked = steps_to(target / 20, list(BUDGETS), curve)
        assert (found is None) == (walked is None)
        assert found is None or walked - 0.1 - 1e-6 <= found <= walked + 1e-6


class TestCurves:
    """From curves to the arrays above."""

    @staticmethod
    def curve(role, adversary, seed, scores, folds=4):
        means = [None if s is None else [s] * folds for s in scores]
        return Curve(
            adversary=adversary, role=role, seed=seed, budgets=list(BUDGETS), scores=scores, losses=[None, 1, 1, 1],
            folds=means, batch_size=10,
        )  # fmt: skip

    def test_any_order(self):
        curves = [
            self.curve(role, name, seed, [0.1, 0.2, 0.3, (seed + (name == "b")) / 10])
            for role in ROLES
            for name in "ab"
            for seed in range(3)
        ]
        one, two = Comparison.of(curves), Comparison.of(curves[::-1])
        assert one.batteries["scratch"].scores.shape == (2, 3, 4, 4)
        assert one.batteries["scratch"].scores[1, 2, 3].tolist() == [0.3] * 4
        assert one.cells() == two.cells()

    def test_not_finite(self):
        curves = [self.curve("scratch", "a", 0, [0.1, None, 0.3, None])]
        assert np.isnan(Comparison.of(curves).batteries["scratch"].scores[0, 0]).all(1).tolist() == [False, True] * 2
        curves = [self.curve("scratch", "a", 0, [None] * 4)]
        assert Comparison.of(curves).cells()[0]["scratch"].mean is None

    def test_a_model_without_any_score_leaves_the_others_theirs(self):
        """One that could not be run has no folds, and the controls have theirs and a band."""
        values = {"immunized": [None] * 4, "original": [0.1, 0.6, 0.7, 0.8], "scratch": [0.1, 0.2, 0.3, 0.4]}
        curves = [self.curve(role, "a", seed, v, folds=8) for role, v in values.items() for seed in (0, 1)]
        row = Comparison.of(curves).rows()[-1]
        assert row.interval is None
        assert row.original_interval.low == pytest.approx(0.4)

    def test_best_name_is_of_the_whole_test_split(self):
        curves = [self.curve("scratch", n, s, [0.1, v, 0.2, 0.2]) for n, v in (("a", 0.3), ("b", 0.4)) for s in (0, 1)]
        one = Comparison.of(curves).batteries["scratch"]
        assert [one.best_name(k) for k in range(4)] == ["a", "b", "b", "b"]
