"""RIR_theta0 on groups of samples: against its equation, and what must hold whatever the network."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from conftest import toy_task
from holdfast.defenses import ConditionNumber, FrontierDefense
from holdfast.errors import HoldfastError
from holdfast.metrics.rir import (
    GroupRatios,
    GroupSpectra,
    draw_groups,
    group_spectra,
    grouped_features,
    relative_conditioning,
)
from holdfast.models import SplitModel
from holdfast.spectral.frontier import Frontier
from holdfast.spectral.least_squares import LeastSquares
from holdfast.spectral.rir import relative_immunization_ratio
from holdfast.tasks.splits import halves

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tasks():
    return toy_task(3), toy_task(3, seed=1)


def narrow(seed=0, width=8):
    """A network whose features all have full rank on a group."""
    torch.manual_seed(seed)
    return SplitModel(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)), "2", name="narrow")


def inputs(task, split, places):
    x = torch.cat([batch.x for batch in task.sweep(split, 7, device=CPU)]).double()
    return list(x[places])


def body(model):
    twin = model.clone().double().eval()
    return lambda x: twin.features(x).detach()


class TestEquation17:
    @pytest.mark.parametrize("width", [8, 40])  # fewer and more features than samples of a group
    def test_agrees_with_the_equation(self, tasks, width):
        original, immunized = narrow(0, width), narrow(1, width)
        drawn = [draw_groups(t, s, 4, 25, 3) for t, s in zip(tasks, ("test", "train"), strict=True)]
        groups = [inputs(t, s, d) for t, s, d in zip(tasks, ("test", "train"), drawn, strict=True)]
        expected = reference.rir_theta0(body(original), body(immunized), *groups)
        found = relative_conditioning(original, immunized, *tasks, groups=4, samples=25, seed=3)
        for got, wanted in zip(zip(found.restricted, found.benign, found.rir, strict=True), expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-6)

    def test_the_same_network_gives_exactly_one(self, trained, benign, restricted):
        found = relative_conditioning(trained, trained.clone(), benign, restricted, groups=3, samples=40)
        assert set(found.restricted) == set(found.benign) == set(found.rir) == {1.0}
        assert found.restricted_ranks == found.benign_ranks == ()

    @settings(max_examples=15, deadline=None)
    @given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 3))
    def test_the_scale_of_the_features_changes_nothing(self, scale, seed):
        pair = toy_task(3), toy_task(3, seed=1)
        original, immunized = narrow(seed), narrow(seed)
        immunized.insert_extractor(scale * torch.eye(8, dtype=torch.float64))
        found = relative_conditioning(original, immunized, *pair, groups=2, samples=30)
        assert found.restricted == pytest.approx((1, 1), rel=1e-9)
        assert found.benign == pytest.approx((1, 1), rel=1e-9)

    def test_of_an_inserted_extractor_it_is_the_frontiers_ratio(self, tasks):
        original, immunized = narrow(), narrow()
        generator = torch.Generator().manual_seed(0)
        theta = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        immunized.insert_extractor(theta)
        p, h = (
            grouped_features(original.clone().double(), t, s, draw_groups(t, s, 2, 30, 0))
            for t, s in zip(tasks, ("test", "train"), strict=True)
        )
        found = relative_conditioning(original, immunized, *tasks, groups=2, samples=30)
        for k in range(2):
            expected = relative_immunization_ratio(theta, LeastSquares.of(p[k]), LeastSquares.of(h[k]))
            assert found.restricted[k] == pytest.approx(expected.restricted, rel=1e-6)
            assert found.benign[k] == pytest.approx(expected.benign, rel=1e-6)

    def test_no_inserted_extractor_exceeds_the_bound_and_the_frontier_reaches_it(self, tasks):
        original = narrow()
        before = group_spectra(original, *tasks, groups=1, samples=40)
        p, h = (
            grouped_features(original.clone().double(), t, s, draw_groups(t, s, 1, 40, 0))[0]
            for t, s in zip(tasks, ("test", "train"), strict=True)
        )
        frontier = Frontier.of(LeastSquares.of(p), LeastSquares.of(h))
        for theta, reached in ((frontier.stretch(), True), (torch.randn(8, 8, dtype=torch.float64), False)):
            immunized = original.clone()
            immunized.insert_extractor(theta)
            (rir,) = GroupRatios.of(before, group_spectra(immunized, *tasks, groups=1, samples=40)).rir
            assert rir == pytest.approx(before.bounds[0], rel=1e-4) if reached else rir < before.bounds[0]


class TestPrecision:
    def test_small_singular_values_are_real_ones_and_not_float32s(self, tasks):
        """A feature that differs from another by 1e-9: in float32 their difference is rounding."""
        original = narrow()
        immunized = original.clone()
        theta = torch.eye(8, dtype=torch.float64)
        theta[0, 1], theta[1, 1] = 1.0, 1e-9
        immunized.insert_extractor(theta)
        found = relative_conditioning(original, immunized, *tasks, groups=1, samples=40)
        assert found.restricted[0] > 1e14
        assert found.restricted_ranks == ()
        assert original.dtype == immunized.dtype == torch.float32  # left as they are

    def test_directions_that_vanish_are_counted(self, tasks):
        original = narrow()
        immunized = original.clone()
        with torch.no_grad():
            immunized.network[0].weight[0] = 0
            immunized.network[0].bias[0] = 0
        found = relative_conditioning(original, immunized, *tasks, groups=2, samples=40)
        assert found.restricted_ranks == found.benign_ranks == ((8, 7), (8, 7))

    def test_features_that_are_not_finite_or_all_zero_have_no_ratio(self, tasks):
        original = narrow()
        for value in (math.nan, 0.0):
            broken = original.clone()
            for weight in broken.network[0].parameters():
                nn.init.constant_(weight, value)
            found = relative_conditioning(original, broken, *tasks, groups=2, samples=40)
            assert found.rir == found.restricted == (None, None)
            assert found.immunized == 0

    def test_code_that_fixes_its_precision_is_refused(self, tasks):
        class Fixed(nn.Module):
            def __init__(self, head):
                super().__init__()
                self.first, self.head = nn.Linear(6, 8), head

            def forward(self, x):
                return self.head(self.first(x).tanh().float())

        class Casting(nn.Linear):
            def forward(self, x):
                return super().forward(x.to(self.weight.dtype))

        for head, message in ((nn.Linear(8, 3), "cannot compute in float64"), (Casting(8, 3), "fixes a precision")):
            with pytest.raises(HoldfastError, match=message):
                group_spectra(SplitModel(Fixed(head), "head", name="fixed"), *tasks, groups=1, samples=20)


class TestGroups:
    def test_without_replacement_inside_a_group_and_by_the_seed(self, benign):
        places = draw_groups(benign, "test", 5, 60, 0)
        assert places.shape == (5, 60)
        assert all(len(group.unique()) == 60 for group in places)
        assert torch.equal(places, draw_groups(benign, "test", 5, 60, 0))
        assert not torch.equal(places, draw_groups(benign, "test", 5, 60, 1))
        assert torch.equal(places[:2], draw_groups(benign, "test", 2, 60, 0))

    def test_features_are_those_of_their_places(self, model, benign):
        places = torch.tensor([[600, 3, 3], [0, 250, 3]])
        twin = model.clone().double().eval()
        found = grouped_features(twin, benign, "train", places)
        x = torch.cat([b.x for b in benign.sweep("train", 100, device=CPU)])
        assert torch.allclose(found, twin.features(x[places.flatten()].double()).view(2, 3, -1), atol=1e-12)

    def test_both_networks_get_the_same_samples(self, trained, benign, restricted):
        one = group_spectra(trained, benign, restricted, groups=2, samples=30, seed=5)
        assert one == group_spectra(trained, benign, restricted, groups=2, samples=30, seed=5)
        assert one != group_spectra(trained, benign, restricted, groups=2, samples=30, seed=6)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"groups": 0}, "0 groups of 100 samples"),
            ({"samples": 1}, "20 groups of 1 samples"),
            ({"samples": 10_000}, r"has 10000 samples, but the test split of .* has only 223; lower `samples`"),
        ],
    )
    def test_refuses(self, trained, benign, restricted, settings, message):
        with pytest.raises(HoldfastError, match=message):
            group_spectra(trained, benign, restricted, **settings)

    def test_refuses_denoisers(self, denoiser, digit_images):
        with pytest.raises(HoldfastError, match="the denoising task"):
            group_spectra(denoiser, *digit_images)

    def test_what_counts_as_immunized(self):
        ranks = {"benign_ranks": (2, 2), "restricted_ranks": (2, 2), "bounds": (None, None)}
        before = GroupSpectra(benign=(4.0, 4.0), restricted=(3.0, 3.0), **ranks)
        found = GroupRatios.of(before, GroupSpectra(benign=(4.0, 5.0), restricted=(6.0, 6.0), **ranks))
        assert found.immunized == 1


class TestDeepNetworks:
    """The closed-form extractors before the head of a network, on samples that neither of them has seen."""

    def test_the_frontier_is_ahead_of_any_other_and_within_the_bound(self, trained, benign, restricted, run):
        defender_data, adversary_data = halves(restricted)
        before = group_spectra(trained, benign, adversary_data, groups=5)
        found = {}
        for name, defense in (("frontier", FrontierDefense()), ("condition", ConditionNumber(iterations=60))):
            immunized, _ = defense.immunize(trained, benign, defender_data, run=run)
            found[name] = GroupRatios.of(before, group_spectra(immunized, benign, adversary_data, groups=5))
        assert statistics.fmean(found["frontier"].rir) > statistics.fmean(found["condition"].rir)
        assert statistics.fmean(found["frontier"].restricted) > 1
        for bound, *ratios in zip(before.bounds, *(r.rir for r in found.values()), strict=True):
            assert bound is None or max(ratios) <= bound * (1 + 1e-6)
