from __future__ import annotations

import numpy as np
import pytest

import holdfast
from holdfast import api
from holdfast.errors import HoldfastError
from holdfast.metrics.feasibility import assess
from holdfast.models import feature_precision, features
from holdfast.spectral.frontier import Frontier
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import ArrayTask, RegressionTask, load_task


def vectors(scales, seed=0, name="toy"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, len(scales))) * np.array(scales)
    y = np.arange(200) % 2
    return ArrayTask(name, x[:150], y[:150], x[150:], y[150:])


def test_tasks_stretched_alike_cannot_be_immunized():
    found, _ = assess(None, vectors([1, 2, 3]), vectors([1, 2, 3], seed=1))
    assert found.label == "impossible"
    assert found.rir_bound < 2
    assert "stretched alike" in found.sentence


def test_tasks_stretched_against_each_other_can():
    found, figures = assess(None, vectors([1, 1, 9]), vectors([9, 1, 1], seed=1))
    assert found.label == "possible"
    assert found.rir_bound == pytest.approx(found.kappa_m * found.kappa_benign / found.kappa_restricted)
    assert set(figures) == {"spectra", "angles", "frontier"}
    line = figures["frontier"]
    assert line.series["frontier"] == pytest.approx([found.kappa_m * k for k in line.x])


@pytest.mark.parametrize(("samples", "width"), [(200, 64), (400, 64), (2000, 64)])
def test_sampling_noise_is_not_called_possible(samples, width):
    """Two draws of one distribution: the true RIR* is 1, and a bound from samples is far above it."""
    tasks = []
    for seed in range(2):
        x = np.random.default_rng(seed).normal(size=(samples, width))
        tasks.append(ArrayTask(f"draw {seed}", x, np.arange(samples) % 2, x[:10], np.arange(10) % 2))
    found, _ = assess(None, *tasks)
    assert found.rir_bound > 2
    assert found.label != "possible"
    assert "ampling" in found.reasons[0]


def test_rounding_of_float32_is_no_direction():
    """A column that is the sum of two others, in float32: a direction of 1e-8 that is not there."""
    tasks = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(300, 3)) * [1, 2, 3]
        x = np.column_stack([x, 2 * x[:, 0] + x[:, 1] / 3])
        tasks.append(ArrayTask(f"draw {seed}", x, np.arange(300) % 2, x[:10], np.arange(10) % 2))
    found, _ = assess(None, *tasks)
    assert (found.rank_benign, found.rank_restricted) == (3, 3)
    assert found.kappa_benign < 100


def test_in_between_is_said():
    assert assess(None, vectors([1, 1, 2]), vectors([2, 1, 1], seed=1))[0].label in ("marginal", "possible")


def test_the_numbers_are_the_frontiers(trained, benign, restricted):
    found, _ = assess(trained, benign, restricted)
    pair = [features(trained, t, "train") for t in (benign, restricted)]
    frontier = Frontier.of(*(LeastSquares.of(*xy, precision=feature_precision(trained, benign)) for xy in pair))
    assert found.rir_bound == pytest.approx(frontier.bound, rel=1e-6)
    assert found.common == frontier.basis.shape[1]
    assert found.leak == pytest.approx(frontier.leak(), rel=1e-6)
    assert found.tau["signal frontier"]["benign"] == 1


def test_a_direction_that_one_task_lacks_is_reported_both_ways():
    found, _ = assess(None, vectors([1, 1, 0]), vectors([3, 1, 1], seed=1))
    assert (found.features, found.common, found.rank_benign, found.rank_restricted) == (3, 2, 2, 3)
    assert "both use 2" in found.reasons[1]


def test_regression_tasks():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4)) * [1, 2, 3, 4]
    tasks = [
        RegressionTask(n, x[:60], x[:60] @ w, x[60:], x[60:] @ w) for n, w in (("a", [1, 0, 0, 0]), ("b", [0, 0, 0, 1]))
    ]
    found, _ = assess(None, *tasks)
    assert found.leak < 0.2


def test_other_shapes_are_refused():
    with pytest.raises(HoldfastError, match="must agree"):
        assess(None, load_task("digits[0-4]"), load_task("digits[5-9]@image_size=6"))


@pytest.mark.parametrize(("settings", "message"), [({"q": 2}, "q is 2"), ({"ridge": 0}, "ridge is 0")])
def test_bad_settings_are_refused_before_a_folder_is_taken(tmp_path, settings, message):
    with pytest.raises(HoldfastError, match=message):
        api.feasibility(load_task("digits[0-4]"), load_task("digits[5-9]"), folder=tmp_path / "f", **settings)
    assert not (tmp_path / "f").exists()


def test_disjoint_supports_are_answered_by_the_ridge():
    found, _ = assess(None, vectors([1, 1, 0, 0]), vectors([0, 0, 1, 1]))
    assert found.rir_bound == pytest.approx(found.rir_bound_ridge)
    assert found.common == 0
    assert any("share none of 4 directions" in reason for reason in found.reasons)


def test_too_few_samples_are_not_called_impossible():
    tasks = []
    for seed in range(2):
        x = np.random.default_rng(seed).normal(size=(33, 64))
        tasks.append(ArrayTask(f"draw {seed}", x, np.arange(33) % 2, x[:10], np.arange(10) % 2))
    found, _ = assess(None, *tasks)
    assert found.common == 2
    assert found.label == "marginal"
    assert found.sentence.startswith("Not clear: the tasks' samples share 2 of 64 directions")


def test_the_verb_writes_a_folder(tmp_path):
    found = api.feasibility(load_task("digits[0-4]"), load_task("digits[5-9]"), folder=tmp_path / "f", device="cpu")
    result = holdfast.read_result(tmp_path / "f")
    assert result.feasibility == found
    page = (tmp_path / "f" / "report.html").read_text()
    assert found.sentence.split(":")[0] in page
