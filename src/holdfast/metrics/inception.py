"""FID and KID as papers report them: distances of pictures by the features of one Inception network, which users give.

The network and FID are those of torch-fidelity, whose weights file is not part of any package. KID is `kernel_distance`
of the features, over all pictures instead of random subsets.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.tasks import located
from holdfast.tasks.paths import data_folder

LAYER: Final = "2048"
"""The features of FID and KID: the pooled ones before the last layer, 2,048 numbers a picture."""

BATCH: Final = 32
"""Pictures computed at a time."""


def inception_features(place: str, pictures: Tensor, device: torch.device) -> Tensor:
    """Returns the features of pictures.

    Args:
        place: the file with the weights; relative ones are also searched for in `$HOLDFAST_DATA`.
        pictures: shape (N, 1 or 3, H, W), in [0, 1]; grey ones are shown in three equal channels.
        device: where they are computed.

    Returns:
        float64, shape (N, 2048), on the CPU; NaN for a picture that is not finite.

    Raises:
        HoldfastError: as `load_inception`.
    """
    network = load_inception(place).to(device)
    shown = pictures.detach().float()
    bytes_ = (shown.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    with torch.no_grad():
        parts = [network(part.to(device))[0].double().cpu() for part in torch.split(bytes_, BATCH)]
    finite = shown.isfinite().flatten(1).all(1).cpu()
    return torch.where(finite[:, None], torch.cat(parts), torch.nan)


def frechet_inception_distance(a: Tensor, b: Tensor) -> float:
    """Returns FID (Heusel et al. 2017), which is too large with few pictures: papers take 10,000 or more.

    Args:
        a: features of shape (N, D), N at least 2.
        b: features of shape (M, D), M at least 2.

    Returns:
        NaN where a feature is not finite.

    Raises:
        HoldfastError: if torch-fidelity is not installed.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    _fidelity()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    return float(fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)[KEY_METRIC_FID])


@lru_cache(maxsize=1)
def load_inception(place: str) -> Any:
    """Returns torch-fidelity's Inception network with weights from a file, in evaluation mode.

    Raises:
        HoldfastError: if torch-fidelity is not installed, or the file is missing, has more than tensors, or has other
            ones than the network.
    """
    _fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = Path(located(place, data_folder(None)))
    try:
        torch.load(file, weights_only=True)  # torch-fidelity would run code in the file
        return FeatureExtractorInceptionV3("inception", [LAYER], str(file))
    except Exception as error:  # an unknown file may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise HoldfastError(
            f"The Inception weights {place!r} cannot be loaded: {reason}. Expected torch-fidelity's file "
            "weights-inception-2015-12-05-6726825d.pth, which its releases on GitHub have."
        ) from error


def _fidelity() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise HoldfastError(
            "FID and KID need the package torch-fidelity, which is not installed: pip install 'holdfast[generation]'."
        ) from error
