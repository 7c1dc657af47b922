"""Adversaries: ways to fine-tune a released model, and the batteries that an audit runs."""

from holdfast.adversaries.base import Adversary
from holdfast.adversaries.batteries import BATTERIES, SEARCHES, battery, listed
from holdfast.adversaries.finetuning import FineTuning
from holdfast.adversaries.probes import Probe
from holdfast.adversaries.search import Search

__all__ = ["BATTERIES", "SEARCHES", "Adversary", "FineTuning", "Probe", "Search", "battery", "listed"]
