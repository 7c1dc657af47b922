"""Models: a network split into a body and a head; built-in ones, timm's, Hugging Face's, and the user's code."""

from holdfast.models.activation_cache import FrozenActivations
from holdfast.models.blocks import is_normalisation
from holdfast.models.compatibility import architecture_differences, check_fits
from holdfast.models.families.diffusion import Denoiser
from holdfast.models.families.hf_causal import CausalModel
from holdfast.models.families.text_to_image import TextToImage
from holdfast.models.family import FAMILIES, Built, Family, is_code, list_models, register
from holdfast.models.features import both_splits, check_feature_width, feature_batches, feature_precision, features
from holdfast.models.introspection import every_tensor
from holdfast.models.loading import load_model, load_released
from holdfast.models.spec import ModelSpec
from holdfast.models.split_model import SplitModel
from holdfast.models.task_tokenizer import load_task_for, read_by
from holdfast.models.transplant import foreign_code, transplant

__all__ = [
    "FAMILIES",
    "Built",
    "CausalModel",
    "Denoiser",
    "Family",
    "FrozenActivations",
    "ModelSpec",
    "SplitModel",
    "TextToImage",
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
    "list_models",
    "load_model",
    "load_released",
    "load_task_for",
    "read_by",
    "register",
    "transplant",
]
