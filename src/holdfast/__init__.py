"""Holdfast: immunize open-weight models against harmful fine-tuning, and audit honestly whether it worked.

The verbs are `run`, `immunize`, `audit`, `feasibility` and `pretrain`; `load_task` and `load_model` give them
their input. Names are loaded on first use, so that the command line's help does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; the names themselves are loaded by `__getattr__`
    from holdfast.adversaries import BATTERIES, Adversary, FineTuning, Probe, list_adversaries, list_batteries
    from holdfast.api import audit, feasibility, immunize, run
    from holdfast.defenses import (
        DEFENSES,
        IMMA,
        LEACE,
        NTL,
        TAR,
        ConceptErasure,
        ConditionNumber,
        DeepCondition,
        DeepIMMA,
        DeepOptKappa,
        DeepRIll,
        Defense,
        DiffusionIMMA,
        FrontierDefense,
        OptKappa,
        RepNoise,
        RidgeProbeSuppression,
        RIllOnly,
        SignalFrontier,
        SlowProbeSuppression,
        Sophon,
        TrajectoryErasure,
        list_defenses,
    )
    from holdfast.errors import HoldfastError
    from holdfast.experiments.measurements.base import list_measurements
    from holdfast.models import CausalModel, Denoiser, ModelSpec, SplitModel, TextToImage, list_models, load_model
    from holdfast.report import write_report
    from holdfast.results import AuditResult, Feasibility, RunResult, read_result
    from holdfast.runtime.callbacks import Callback, Tracker
    from holdfast.spectral.condition_numbers import condition_number
    from holdfast.spectral.frontier import Frontier
    from holdfast.spectral.least_squares import LeastSquares
    from holdfast.tasks import (
        ArrayTask,
        DenoisingTask,
        NextTokenTask,
        RegressionTask,
        Schedule,
        Task,
        TaskSpec,
        TextTask,
        TextToImageTask,
        list_tasks,
        load_task,
    )
    from holdfast.tasks.splits import halves
    from holdfast.training import Strategy, pretrain

_HOME = {
    "api": ("audit", "feasibility", "immunize", "run"),
    "adversaries": (
        "BATTERIES", "Adversary", "DirectionalAblation", "FewShotPrompt", "FineTuning", "Probe", "list_adversaries",
        "list_batteries",
    ),
    "defenses": (
        "DEFENSES", "IMMA", "LEACE", "NTL", "TAR", "ConceptErasure", "ConditionNumber", "DeepCondition", "DeepIMMA",
        "DeepOptKappa", "DeepRIll", "Defense", "DiffusionIMMA", "FrontierDefense", "OptKappa", "RIllOnly", "RepNoise",
        "RidgeProbeSuppression", "SignalFrontier", "SlowProbeSuppression", "Sophon", "TrajectoryErasure",
        "list_defenses",
    ),
    "errors": ("HoldfastError",),
    "experiments.measurements.base": ("list_measurements",),
    "models": ("CausalModel", "Denoiser", "ModelSpec", "SplitModel", "TextToImage", "list_models", "load_model"),
    "report": ("write_report",),
    "runtime.callbacks": ("Callback", "Tracker"),
    "results": ("AuditResult", "Feasibility", "RunResult", "read_result"),
    "spectral.frontier": ("Frontier",),
    "spectral.least_squares": ("LeastSquares",),
    "spectral.condition_numbers": ("condition_number",),
    "tasks": (
        "ArrayTask", "DenoisingTask", "NextTokenTask", "RegressionTask", "Schedule", "Task", "TaskSpec", "TextTask",
        "TextToImageTask", "list_tasks", "load_task",
    ),
    "tasks.splits": ("halves",),
    "training": ("Strategy", "pretrain"),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("holdfast")
    if name not in _MODULE:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_module(f"holdfast.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
