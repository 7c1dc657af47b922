"""FID and KID by Inception's features: the network and the statistics are torch-fidelity's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from holdfast.errors import HoldfastError
from holdfast.metrics.generation import kernel_distance
from holdfast.metrics.inception import frechet_inception_distance, inception_features
from pipelines import saved_inception

fidelity = pytest.importorskip("torch_fidelity")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return saved_inception(tmp_path_factory.mktemp("inception"))


def features(seed, shift=0.0):
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(seed)).double() + shift


def test_features_are_those_of_the_network(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pictures = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    network = FeatureExtractorInceptionV3("own", ["2048"], weights)
    (wanted,) = network((pictures * 255).round().to(torch.uint8))
    found = inception_features(weights, pictures, CPU)
    assert found.shape == (2, 2048)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5)


def test_grey_pictures_and_those_that_are_not_finite(weights):
    grey = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    grey[1, 0, 0, 0] = torch.nan
    found = inception_features(weights, grey, CPU)
    colour = inception_features(weights, grey[:1].expand(-1, 3, -1, -1), CPU)
    torch.testing.assert_close(found[0], colour[0])
    assert found[1].isnan().all()
    assert np.isnan(frechet_inception_distance(found, found))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_fid_is_frechets_distance_of_two_normal_distributions(shift):
    a, b = features(0), features(1, shift)
    (m, s), (n, t) = ((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    wanted = ((m - n) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_inception_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_kid_is_torch_fidelitys_over_one_subset_of_all():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    a, b = features(0), features(1, 0.5)
    wanted = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=40, verbose=False)[KEY_METRIC_KID_MEAN]
    assert kernel_distance(a, b).value == pytest.approx(wanted, rel=1e-6)


def test_files_that_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("this must not be run",)

    with pytest.raises(HoldfastError, match=r"cannot be loaded.*Expected torch-fidelity's file"):
        inception_features(str(tmp_path / "missing.pth"), torch.rand(2, 3, 8, 8), CPU)
    torch.save({"weight": Code()}, tmp_path / "code.pth")
    with pytest.raises(HoldfastError, match="cannot be loaded"):
        inception_features(str(tmp_path / "code.pth"), torch.rand(2, 3, 8, 8), CPU)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(HoldfastError, match="cannot be loaded"):
        inception_features(str(tmp_path / "other.pth"), torch.rand(2, 3, 8, 8), CPU)
