"""Models: a network split into a body and a head; built-in ones, and any of timm's."""

from holdfast.models.base import SplitModel, check_fits, check_same_architecture
from holdfast.models.blocks import is_normalisation
from holdfast.models.catalog import ModelSpec, load_model, load_released
from holdfast.models.features import check_feature_width, feature_batches, feature_precision, features

__all__ = [
    "ModelSpec",
    "SplitModel",
    "check_feature_width",
    "check_fits",
    "check_same_architecture",
    "feature_batches",
    "feature_precision",
    "features",
    "is_normalisation",
    "load_model",
    "load_released",
]
