"""Adversaries: ways to fine-tune a released model, and the batteries that an audit runs."""

from holdfast.adversaries.base import KINDS, Adversary
from holdfast.adversaries.batteries import (
    BATTERIES,
    SEARCHES,
    battery,
    battery_config,
    battery_name,
    build,
    list_adversaries,
    list_batteries,
    listed,
    register_battery,
    trained_with,
)
from holdfast.adversaries.directional_ablation import DirectionalAblation
from holdfast.adversaries.dreambooth import DreamBooth
from holdfast.adversaries.few_shot_prompt import FewShotPrompt
from holdfast.adversaries.finetuning import FineTuning
from holdfast.adversaries.probes import Probe
from holdfast.adversaries.search_space import Search
from holdfast.adversaries.textual_inversion import TextualInversion
from holdfast.adversaries.undo.moves import UNDO, undo_move
from holdfast.adversaries.unlabelled import Unlabelled

__all__ = [
    "BATTERIES",
    "KINDS",
    "SEARCHES",
    "UNDO",
    "Adversary",
    "DirectionalAblation",
    "DreamBooth",
    "FewShotPrompt",
    "FineTuning",
    "Probe",
    "Search",
    "TextualInversion",
    "Unlabelled",
    "battery",
    "battery_config",
    "battery_name",
    "build",
    "list_adversaries",
    "list_batteries",
    "listed",
    "register_battery",
    "trained_with",
    "undo_move",
]
