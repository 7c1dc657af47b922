"""Concept erasure: what its theorem promises, and what becomes of it inside a network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from conftest import toy_task
from holdfast.adversaries import Probe
from holdfast.defenses import LEACE, FrontierDefense
from holdfast.defenses.leace import Eraser
from holdfast.errors import HoldfastError
from holdfast.experiments.model_store import ModelStore
from holdfast.experiments.recipe import StudyRecipe
from holdfast.models import SplitModel, features, load_model, transplant
from holdfast.runtime.run import Run
from holdfast.spectral.frontier import explained
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import load_task
from holdfast.tasks.splits import halves
from holdfast.training import pretrain

CPU = torch.device("cpu")


def draw(seed=0, samples=60, width=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % classes
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mixed + 2 * centres[y] + 3
    return x, nn.functional.one_hot(y, classes).double()


def left(x, y):
    """What a linear probe explains of y by x."""
    return explained(LeastSquares.of(x - x.mean(0), y - y.mean(0)))


class TestTheorem:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), width=st.integers(1, 12), classes=st.integers(2, 6), samples=st.integers(8, 60))
    def test_no_covariance_is_left_and_no_probe_explains_anything(self, seed, width, classes, samples):
        x, y = draw(seed, samples, width, classes)
        eraser = Eraser.fit(x, y)
        erased = x @ eraser.projection + eraser.shift
        cross = (erased - erased.mean(0)).T @ (y - y.mean(0)) / samples
        assert cross.abs().max() < 1e-9 * x.abs().max()
        assert eraser.rank <= min(width, classes - 1)
        if samples > width + classes > 2 * classes:  # where all directions are erased, only rounding is left to explain
            assert left(erased, y) < 1e-9 * left(x, y)

    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_least_change_of_all_that_erase(self, seed):
        x, y = draw(seed)
        eraser = Eraser.fit(x, y)
        p, b = reference.least_squares_erasure(x, y)
        assert torch.allclose(eraser.projection.T, p, atol=1e-8)
        assert torch.allclose(eraser.shift, b, atol=1e-8)

    def test_in_every_norm(self):
        x, y = draw(1)
        root = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        p, _ = reference.least_squares_erasure(x, y, root.T @ root)
        assert torch.allclose(Eraser.fit(x, y).projection.T, p, atol=1e-7)

    def test_is_a_projection_and_keeps_the_mean(self):
        x, y = draw(2)
        eraser = Eraser.fit(x, y)
        assert torch.allclose(eraser.projection @ eraser.projection, eraser.projection, atol=1e-9)
        assert torch.allclose((x @ eraser.projection + eraser.shift).mean(0), x.mean(0))
        assert torch.linalg.matrix_rank(eraser.projection) == 5 - eraser.rank == 3

    def test_where_labels_are_constant_nothing_is_erased(self):
        x, _ = draw()
        eraser = Eraser.fit(x, torch.ones(len(x), 1))
        assert eraser.rank == 0
        assert torch.equal(eraser.projection, torch.eye(5, dtype=torch.float64))

    def test_features_that_depend_on_each_other(self):
        x, y = draw()
        x = torch.cat([x, x[:, :2] @ torch.ones(2, 1, dtype=torch.float64), torch.zeros(len(x), 1)], 1)
        eraser = Eraser.fit(x, y)
        assert left(x @ eraser.projection + eraser.shift, y) < 1e-9 * left(x, y)


class TestInANetwork:
    @pytest.fixture
    def tasks(self):
        return toy_task(3), toy_task(4, seed=1)

    @pytest.fixture
    def original(self, tasks):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        return SplitModel(network, "2", spec={"name": "toy"})

    def test_a_closed_form_probe_learns_nothing_on_the_data_it_was_fitted_on(self, original, tasks, run):
        immunized, record = LEACE().immunize(original, *tasks, run=run)
        z, y = features(immunized, tasks[1], "train")
        assert left(z, y) < 1e-9 * left(features(original, tasks[1], "train")[0], y)
        assert record.history["erased"] == [3]
        assert "3 of 16 directions" in record.events[0].message

    def test_and_on_the_adversarys_half_little(self, trained, benign, restricted, run):
        defender_data, adversary_data = halves(restricted)
        immunized, _ = LEACE().immunize(trained, benign, defender_data, run=run)
        before, after = (
            Probe("ridge").attack(model, adversary_data, budgets=(0, 1), run=run).scores[1]
            for model in (trained, immunized)
        )
        assert before > 0.8
        assert after < before - 0.3

    def test_the_head_is_fitted_anew_or_left(self, original, tasks, run):
        x = next(tasks[0].sweep("train", 60, device=CPU)).x
        apart = {}
        for keep in (True, False):
            immunized, record = LEACE(keep_benign=keep).immunize(original, *tasks, run=run)
            with torch.no_grad():
                apart[keep] = float((immunized(x) - original(x)).norm())
            same = torch.equal(immunized.head.weight, original.head.weight)
            assert same is not keep
            assert record.history["output_change"][0] > 0
        assert apart[True] < apart[False]

    def test_a_head_without_a_bias_and_one_that_is_a_convolution(self, benign, restricted, run):
        for head in (nn.Conv2d(6, 5, 1, bias=False), nn.Conv2d(6, 5, 1)):
            network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), head)
            model = SplitModel(network, "3")
            immunized, _ = LEACE().immunize(model, benign, restricted, run=run)
            z, y = features(immunized, restricted, "train")
            assert left(z, y) < 1e-3 * left(features(model, restricted, "train")[0], y)  # float32 features

    def test_survives_the_disk_the_store_and_another_process(self, trained, benign, restricted, run, tmp_path):
        immunized, _ = LEACE().immunize(trained, benign, restricted, run=run)
        assert immunized.spec["extractor"] == "affine"
        immunized.save(tmp_path / "model.safetensors")
        loaded = load_model(str(tmp_path / "model.safetensors"), benign)
        assert loaded.facts().sha256 == immunized.facts().sha256
        store = ModelStore(tmp_path / "store")
        store.put({"a": 1}, immunized, {})
        assert store.get({"a": 1}, trained)[0].facts().sha256 == immunized.facts().sha256
        assert not immunized.fresh().has_extractor
        assert [name for name, _ in immunized.blocks()[-1]][-1] == "head.0"

    def test_starting_the_last_block_anew_removes_it(self, trained, benign, restricted, run):
        immunized, _ = LEACE().immunize(trained, benign, restricted, run=run)
        immunized.reinitialise(["head.0"], trained.fresh())
        layer = immunized.network.get_submodule("head.0")
        assert torch.equal(layer.weight, torch.eye(64, dtype=torch.float64))
        assert not layer.bias.any()

    @pytest.mark.parametrize("first", ["frontier", "leace"])
    def test_before_or_behind_an_extractor(self, first, trained, benign, restricted, run):
        one, two = FrontierDefense(), LEACE(keep_benign=False)
        one, two = (one, two) if first == "frontier" else (two, one)
        once, _ = one.immunize(trained, benign, restricted, run=run)
        twice, _ = two.immunize(once, benign, restricted, run=run)
        z, y = features(twice, restricted, "train")
        assert left(z, y) < 1e-3 * left(features(trained, restricted, "train")[0], y)
        if first == "leace":  # an extractor changes no output, whatever is before it
            x = next(benign.sweep("test", 50, device=CPU)).x
            with torch.no_grad():
                assert torch.allclose(twice(x), once(x), atol=1e-3)

    def test_its_weights_in_the_originals_code_say_the_same(self, trained, benign, restricted, run):
        immunized, _ = LEACE().immunize(trained, benign, restricted, run=run)
        inside = transplant(immunized, trained)
        x = next(benign.sweep("test", 50, device=CPU)).x
        with torch.no_grad():
            assert torch.allclose(inside.eval()(x), immunized(x), atol=1e-4)

    @pytest.mark.parametrize(
        ("projection", "shift", "message"),
        [
            (torch.eye(3), torch.zeros(64), "takes 64 features"),
            (torch.eye(64), torch.zeros(3), "takes 64 features"),
            (torch.eye(64), torch.full((64,), torch.nan), "not finite"),
        ],
    )
    def test_what_is_no_eraser_is_refused(self, model, projection, shift, message):
        with pytest.raises(HoldfastError, match=message):
            model.insert_eraser(projection.double(), shift.double())


class TestWhereItFits:
    def test_a_study_wants_extractors_that_can_be_inverted(self):
        pair = {"benign": {"data": "digits[0-4]"}, "restricted": {"data": "digits[5-9]"}}
        recipe = StudyRecipe.model_validate(
            {"kind": "study", "title": "x", "tables": {"a": {"title": "a", "pair": pair}},
             "methods": {"erase": {"name": "leace"}}}
        )  # fmt: skip
        with pytest.raises(HoldfastError, match="Method 'erase': a study compares linear extractors"):
            recipe.build_methods()

    def test_denoisers_are_refused(self, denoiser, digit_images):
        with pytest.raises(HoldfastError, match="denois"):
            LEACE().immunize(denoiser, *digit_images, run=Run(0, CPU))


def test_a_refitted_head_is_not_fitted_to_rounding(run):
    """Features behind a LayerNorm sum to nothing: a direction of rounding alone, by which weights would be divided."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.LayerNorm(32))
    benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
    model = pretrain(SplitModel(nn.Sequential(*body, nn.Linear(32, 5)), "4"), benign, steps=60)
    erased, _ = LEACE().immunize(model, benign, restricted, run=run)
    assert erased.head.weight.norm() < 10 * model.head.weight.norm()
    x = next(benign.sweep("test", 50, device=CPU)).x
    with torch.no_grad():
        alone = torch.cat([erased(each[None]) for each in x])
        assert torch.allclose(erased(x), alone, atol=1e-4)
