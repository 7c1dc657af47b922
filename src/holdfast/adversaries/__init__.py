"""Adversaries: ways to fine-tune a released model, and the batteries that an audit runs."""

from holdfast.adversaries.base import Adversary
from holdfast.adversaries.batteries import BATTERIES, battery
from holdfast.adversaries.finetuning import FineTuning
from holdfast.adversaries.probes import Probe

__all__ = ["BATTERIES", "Adversary", "FineTuning", "Probe", "battery"]
