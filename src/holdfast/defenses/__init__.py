"""Defenses: an open set. A new defense is one new file here that registers its class with `@register_defense`."""

from holdfast.defenses.base import Defense, DefenseRecord
from holdfast.defenses.concept_erasure import ConceptErasure
from holdfast.defenses.deep.base import DeepDefense
from holdfast.defenses.deep.condition_number import DeepCondition, DeepOptKappa, DeepRIll
from holdfast.defenses.deep.imma import DeepIMMA
from holdfast.defenses.deep.probe_suppression import RidgeProbeSuppression, SlowProbeSuppression
from holdfast.defenses.diffusion_imma import DiffusionIMMA
from holdfast.defenses.leace import LEACE
from holdfast.defenses.linear.base import LinearDefense, LinearProblem
from holdfast.defenses.linear.condition_number import ConditionNumber, RIllOnly
from holdfast.defenses.linear.frontier import FrontierDefense, SignalFrontier
from holdfast.defenses.linear.imma import IMMA
from holdfast.defenses.linear.opt_kappa import OptKappa
from holdfast.defenses.ntl import NTL
from holdfast.defenses.registry import DEFENSES, build_defense, list_defenses, register_defense
from holdfast.defenses.repnoise import RepNoise
from holdfast.defenses.sophon.sophon import Sophon
from holdfast.defenses.sophon.trajectory_erasure import TrajectoryErasure
from holdfast.defenses.tar import TAR

__all__ = [
    "DEFENSES",
    "IMMA",
    "LEACE",
    "NTL",
    "TAR",
    "ConceptErasure",
    "ConditionNumber",
    "DeepCondition",
    "DeepDefense",
    "DeepIMMA",
    "DeepOptKappa",
    "DeepRIll",
    "Defense",
    "DefenseRecord",
    "DiffusionIMMA",
    "FrontierDefense",
    "LinearDefense",
    "LinearProblem",
    "OptKappa",
    "RIllOnly",
    "RepNoise",
    "RidgeProbeSuppression",
    "SignalFrontier",
    "SlowProbeSuppression",
    "Sophon",
    "TrajectoryErasure",
    "build_defense",
    "list_defenses",
    "register_defense",
]
