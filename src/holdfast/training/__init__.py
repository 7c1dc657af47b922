"""Fine-tuning: defenses simulate it, adversaries run it."""

from holdfast.training.finetuning import constant_statistics, finetune, optimizer_of, pretrain
from holdfast.training.gradients import reshape_gradient
from holdfast.training.starts import (
    ADAPTED,
    SHRINK,
    not_applicable,
    prepare,
    renew_blocks,
    renewed,
    shrink_and_perturb,
    trained_modules,
)
from holdfast.training.strategy import (
    OPTIMIZERS,
    Gradient,
    Initialisation,
    Precision,
    PretrainSpec,
    Schedule,
    Scope,
    Strategy,
)

__all__ = [
    "ADAPTED",
    "OPTIMIZERS",
    "SHRINK",
    "Gradient",
    "Initialisation",
    "Precision",
    "PretrainSpec",
    "Schedule",
    "Scope",
    "Strategy",
    "constant_statistics",
    "finetune",
    "not_applicable",
    "optimizer_of",
    "prepare",
    "pretrain",
    "renew_blocks",
    "renewed",
    "reshape_gradient",
    "shrink_and_perturb",
    "trained_modules",
]
