"""Models: a network split into a body and a head; built-in ones, timm's, Hugging Face's, and anybody's code."""

from holdfast.models.base import SplitModel
from holdfast.models.blocks import is_normalisation
from holdfast.models.catalog import ModelSpec, load_model, load_released
from holdfast.models.code import is_code
from holdfast.models.denoiser import Denoiser
from holdfast.models.features import both_splits, check_feature_width, feature_batches, feature_precision, features
from holdfast.models.fitting import architecture_differences, check_fits, foreign_code, transplant
from holdfast.models.heads import every_tensor
from holdfast.models.prefix import Prefix, Rest
from holdfast.models.reading import load_task_for, read_by

__all__ = [
    "Denoiser",
    "ModelSpec",
    "Prefix",
    "Rest",
    "SplitModel",
    "architecture_differences",
    "both_splits",
    "check_feature_width",
    "check_fits",
    "every_tensor",
    "feature_batches",
    "feature_precision",
    "features",
    "foreign_code",
    "is_code",
    "is_normalisation",
    "load_model",
    "load_released",
    "load_task_for",
    "read_by",
    "transplant",
]
