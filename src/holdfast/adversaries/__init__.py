"""Adversaries: ways to fine-tune a released model, and the batteries that an audit runs."""

from holdfast.adversaries.base import Adversary
from holdfast.adversaries.batteries import BATTERIES, battery, build
from holdfast.adversaries.finetuning import FineTuning
from holdfast.adversaries.probes import Probe
from holdfast.adversaries.undo import UNDO

__all__ = ["BATTERIES", "UNDO", "Adversary", "FineTuning", "Probe", "battery", "build"]
