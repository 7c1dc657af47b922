"""Defenses: an open set, one file each; a new one adds its line to `DEFENSES`."""

from typing import Final

from holdfast.defenses.base import Defense, Record
from holdfast.defenses.deep.base import DeepDefense
from holdfast.defenses.deep.condition import DeepCondition, DeepOptKappa, DeepRIll
from holdfast.defenses.deep.imma import DeepIMMA
from holdfast.defenses.deep.probe_suppression import RidgeProbeSuppression, SlowProbeSuppression
from holdfast.defenses.leace import LEACE
from holdfast.defenses.linear.base import LinearDefense, LinearProblem
from holdfast.defenses.linear.condition import ConditionNumber, RIllOnly
from holdfast.defenses.linear.frontier import FrontierDefense, SignalFrontier
from holdfast.defenses.linear.imma import IMMA
from holdfast.defenses.linear.opt_kappa import OptKappa
from holdfast.defenses.ntl import NTL
from holdfast.defenses.sophon.sophon import Sophon

DEFENSES: Final[dict[str, type[Defense]]] = {
    Sophon.name: Sophon,
    NTL.name: NTL,
    FrontierDefense.name: FrontierDefense,
    SignalFrontier.name: SignalFrontier,
    ConditionNumber.name: ConditionNumber,
    RIllOnly.name: RIllOnly,
    IMMA.name: IMMA,
    OptKappa.name: OptKappa,
    DeepCondition.name: DeepCondition,
    DeepRIll.name: DeepRIll,
    DeepIMMA.name: DeepIMMA,
    DeepOptKappa.name: DeepOptKappa,
    RidgeProbeSuppression.name: RidgeProbeSuppression,
    SlowProbeSuppression.name: SlowProbeSuppression,
    LEACE.name: LEACE,
}

__all__ = [
    "DEFENSES",
    "IMMA",
    "LEACE",
    "NTL",
    "ConditionNumber",
    "DeepCondition",
    "DeepDefense",
    "DeepIMMA",
    "DeepOptKappa",
    "DeepRIll",
    "Defense",
    "FrontierDefense",
    "LinearDefense",
    "LinearProblem",
    "OptKappa",
    "RIllOnly",
    "Record",
    "RidgeProbeSuppression",
    "SignalFrontier",
    "SlowProbeSuppression",
    "Sophon",
]
