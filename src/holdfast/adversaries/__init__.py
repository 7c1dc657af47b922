"""Adversaries: ways to fine-tune a released model, and the batteries that an audit runs."""

from holdfast.adversaries.base import Adversary
from holdfast.adversaries.batteries import BATTERIES, KINDS, SEARCHES, battery, build, listed
from holdfast.adversaries.finetuning import FineTuning
from holdfast.adversaries.probes import Probe
from holdfast.adversaries.search_space import Search
from holdfast.adversaries.undo.moves import UNDO

__all__ = [
    "BATTERIES",
    "KINDS",
    "SEARCHES",
    "UNDO",
    "Adversary",
    "FineTuning",
    "Probe",
    "Search",
    "battery",
    "build",
    "listed",
]
