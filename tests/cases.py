"""The case table: one row for each defense and adversary. A new one is tested by adding its row here."""

from __future__ import annotations

from holdfast.adversaries import (
    UNDO,
    Adversary,
    DirectionalAblation,
    DreamBooth,
    FineTuning,
    Probe,
    TextualInversion,
    Unlabelled,
)
from holdfast.adversaries.probes import PREPARATIONS, SOLVERS
from holdfast.defenses import (
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
)
from holdfast.training import OPTIMIZERS, Strategy

_BRIEF = {"iterations": 3, "steps": 2, "batch_sizes": (20,), "reinforcement_batch": 32, "guard_every": 1}

_DEEP = {"iterations": 3, "batch_size": 20, "guard_every": 1, "max_benign_drop": 1.0}

DEFENSES: dict[str, Defense] = {
    "sophon-ice": Sophon(**_BRIEF),
    "sophon-klu": Sophon(loss="klu", **_BRIEF),
    "sophon-released": Sophon(
        loss="released", initialisations=("head",), optimizers=("sgd",), head_gradient=True, **_BRIEF
    ),
    "sophon-many": Sophon(tasks=3, suppression_loops=2, reinforcement_loops=2, gamma=(0.3, 0.7), **_BRIEF),
    "sophon-ce-ascent": Sophon(loss="ce-ascent", **_BRIEF),
    "sophon-every-optimizer": Sophon(optimizers=tuple(OPTIMIZERS), **_BRIEF),
    "sophon-lasting": Sophon(
        population=2,
        tasks=2,
        lifetime=4,
        disjoint=True,
        probe_weight=0.5,
        probe_batch=60,
        probe_depth=2,
        evaluate_every=2,
        distillation=1.0,
        validate_every=2,
        validation_steps=2,
        **_BRIEF,
    ),
    "sophon-wide": Sophon(
        initialisations=("head", "last-block", "last-half", "shrink-perturb"),
        scopes=("all", "last-block", "norm"),
        tasks=2,
        **_BRIEF,
    ),
    "sophon-written-out": Sophon(strategies=(Strategy("head", "all", "nesterov", 1e-2, 20, 1e-4),), **_BRIEF),
    "sophon-exact": Sophon(second_order=True, optimizers=("sgd", "momentum", "nesterov"), **_BRIEF),
    "sophon-bf16": Sophon(precision="bf16", **_BRIEF),
    "sophon-averaged": Sophon(ema=0.7, max_benign_drop=1.0, **_BRIEF),
    "sophon-joint": Sophon(joint_weight=0.1, **_BRIEF),
    "sophon-probe-alone": Sophon(loss="none", probe_weight=1.0, probe_batch=60, **_BRIEF),
    "trajectory-erasure": TrajectoryErasure(probe_batch=60, probe_depth=2, recovery_loops=2, **_BRIEF),
    "ntl": NTL(iterations=4, batch_size=20, guard_every=1, max_benign_drop=1.0),
    "ntl-momentum": NTL(
        iterations=3, batch_size=20, optimizer="momentum", guard_every=2, kernels=3, max_benign_drop=1.0
    ),
    "tar": TAR(iterations=3, steps=4, tasks=2, batch_size=20, batch_sizes=(20,), guard_every=1, max_benign_drop=1.0),
    "repnoise": RepNoise(iterations=4, batch_size=20, guard_every=1, max_benign_drop=1.0),
    "deep-condition": DeepCondition(**_DEEP),
    "deep-condition-whole": DeepCondition(cache_gib=0, optimizer="adam", schedule="constant", **_DEEP),
    "deep-condition-epochs": DeepCondition(epochs=0.5, lambda_well=1e-3, lambda_ill=1e-3, **_DEEP),
    "deep-r-ill": DeepRIll(**_DEEP),
    "deep-imma": DeepIMMA(inner_steps=3, **_DEEP),
    "deep-opt-kappa": DeepOptKappa(**_DEEP),
    "deep-opt-kappa-log": DeepOptKappa(log=True, **_DEEP),
    "ridge-probe": RidgeProbeSuppression(restricted_batch=60, **_DEEP),
    "ridge-probe-bare": RidgeProbeSuppression(mixing=0.0, matching=0.0, distillation=0.0, restricted_batch=60, **_DEEP),
    "slow-probe": SlowProbeSuppression(steps=5, precision="bf16", **_DEEP),
    "condition": ConditionNumber(iterations=20, keep="last"),
    "condition-gd": ConditionNumber(iterations=20, keep="last", optimizer="gd", learning_rate=1e-4),
    "condition-batches": ConditionNumber(iterations=20, keep="last", batch_size=32, learning_rate=1e-4),
    "condition-guaranteed": ConditionNumber(iterations=3, keep="last", step="guaranteed", initialisation="random"),
    "r-ill": RIllOnly(iterations=20, keep="last"),
    "imma": IMMA(iterations=20, keep="last"),
    "opt-kappa": OptKappa(iterations=20, keep="last", log=True),
    "opt-kappa-random": OptKappa(iterations=5, keep="rir", initialisation="random"),
    "frontier": FrontierDefense(),
    "frontier-ridge": FrontierDefense(space="ridge", stretch=0.5, rotate=False),
    "signal-frontier": SignalFrontier(),
    "leace": LEACE(),
    "leace-same-head": LEACE(keep_benign=False),
}
"""Brief settings of every defense."""

_NOISED = {
    "iterations": 2, "steps": 2, "batch_sizes": (8,), "reinforcement_batch": 8, "guard_every": 1,
    "max_benign_drop": 1.0,
}  # fmt: skip

DENOISING: dict[str, Defense] = {
    "sophon-dos": Sophon(**_NOISED),
    "trajectory-erasure": TrajectoryErasure(recovery_loops=2, probe_batch=8, **_NOISED),
    "sophon-mse-ascent": Sophon(loss="mse-ascent", ema=0.7, joint_weight=0.1, **_NOISED),
    "sophon-exact": Sophon(second_order=True, optimizers=("sgd", "momentum"), **_NOISED),
    "sophon-lasting": Sophon(
        population=2,
        tasks=2,
        lifetime=4,
        disjoint=True,
        distillation=1.0,
        validate_every=2,
        validation_steps=2,
        **_NOISED,
    ),
    "sophon-wide-bf16": Sophon(
        precision="bf16",
        initialisations=("head", "last-block", "last-half"),
        scopes=("all", "last-block", "norm"),
        tasks=2,
        **_NOISED,
    ),
}
"""Brief settings of every defense for denoisers."""

_IMMA = {"iterations": 2, "batch_size": 8, "guard_every": 1, "max_benign_drop": 1.0}

TEXT_TO_IMAGE: dict[str, Defense] = {
    "sophon-dos": Sophon(
        initialisations=("direct", "head", "last-half"),
        scopes=("all", "norm"),
        population=2,
        lifetime=3,
        disjoint=True,
        **_NOISED,
    ),
    "sophon-mse-ascent": Sophon(loss="mse-ascent", ema=0.7, joint_weight=0.1, distillation=1.0, **_NOISED),
    "trajectory-erasure": TrajectoryErasure(recovery_loops=2, probe_batch=8, max_timestep=500, **_NOISED),
    "imma-diffusion": DiffusionIMMA(
        inner_steps=2, adaptation=Strategy(batch_size=8), validate_every=1, validation_steps=2, **_IMMA
    ),
    "imma-diffusion-lora": DiffusionIMMA(
        adaptation=Strategy("direct", "lora-attention", "adamw", 1e-2, 8, rank=2),
        optimizer="adamw",
        weight_decay=0.01,
        lifetime=2,
        benign_weight=1.0,
        **_IMMA,
    ),
    "imma-diffusion-dreambooth": DiffusionIMMA(
        method="dreambooth",
        prior_weight=0.5,
        adaptation=Strategy("direct", "lora-attention", "adamw", 1e-2, 8),
        **_IMMA,
    ),
    "imma-diffusion-token": DiffusionIMMA(
        method="textual-inversion", inner_steps=2, adaptation=Strategy("direct", "all", "adamw", 1e-2, 8), **_IMMA
    ),
    "concept-erasure": ConceptErasure(),
    "concept-erasure-anchor": ConceptErasure(
        target="a photo of the digit 0", preserve=("a photo",), preserve_weight=2.0, ridge=1e-3
    ),
}
"""Brief settings of every defense for text-to-image models."""

CAUSAL: dict[str, Defense] = {
    "sophon-ice": Sophon(max_benign_drop=1.0, **_BRIEF),
    "sophon-klu": Sophon(loss="klu", max_benign_drop=1.0, distillation=0.5, **_BRIEF),
    "sophon-wide": Sophon(
        initialisations=("head", "last-block", "shrink-perturb"), scopes=("all", "norm"), tasks=2, population=2,
        lifetime=2, max_benign_drop=1.0, **_BRIEF,
    ),
    "trajectory-erasure": TrajectoryErasure(max_benign_drop=1.0, recovery_loops=2, probe_batch=10, **_BRIEF),
    "tar": TAR(
        iterations=3, steps=4, evaluate_every=2, batch_sizes=(10,), batch_size=10, guard_every=1, max_benign_drop=1.0
    ),
    "repnoise": RepNoise(iterations=3, batch_size=10, guard_every=1, max_benign_drop=1.0),
}  # fmt: skip
"""Brief settings of every defense for causal language models."""

DETERMINISTIC = {
    "r-ill",
    "imma",
    "opt-kappa",
    "frontier",
    "frontier-ridge",
    "signal-frontier",
    "leace",
    "leace-same-head",
    "concept-erasure",
    "concept-erasure-anchor",
}
"""Those of them in which nothing is random."""

ADVERSARIES: dict[str, Adversary] = {
    f"{start}-{scope}-{optimizer}": FineTuning(Strategy(start, scope, optimizer, rate, 20))
    for start, scope in (("direct", "all"), ("head", "all"), ("head", "head"))
    for optimizer, rate in (
        ("sgd", 0.1), ("momentum", 0.02), ("nesterov", 0.02), ("adagrad", 0.01), ("adadelta", 1.0), ("adam", 2e-3),
        ("adamw", 2e-3), ("adafactor", 0.05),
    )
    if (start, scope) == ("head", "all") or optimizer in ("sgd", "adam")  # a start or scope is the same to all of them
} | {
    f"probe-{solver}-{preparation}": Probe(solver, preparation, 0.1)
    for solver in SOLVERS for preparation in PREPARATIONS
} | {
    "start-last-block": FineTuning(Strategy("last-block", "all", "adam", 2e-3, 20)),
    "start-last-half": FineTuning(Strategy("last-half", "all", "adam", 2e-3, 20)),
    "scope-last-block": FineTuning(Strategy("head", "last-block", "adam", 2e-3, 20)),
    "scope-norm": FineTuning(Strategy("head", "norm", "adam", 1e-2, 20)),
    "scope-embeddings": FineTuning(Strategy("head", "embeddings", "adam", 1e-2, 20)),
    "scope-lora": FineTuning(Strategy("head", "lora", "adam", 1e-2, 20, rank=4)),
    "gradient-normalised": FineTuning(Strategy("head", "all", "sgd", 0.1, 20, gradient="normalised")),
    "gradient-sign": FineTuning(Strategy("head", "all", "sgd", 2e-3, 20, gradient="sign")),
    "burn-in": FineTuning(Strategy("head", "all", "sgd", 0.05, 20), burn_in=3),
    "cosine": FineTuning(
        Strategy("head", "all", "adam", 4e-3, 20, schedule="cosine", schedule_steps=60, warmup=5)
    ),
    "replay": FineTuning(Strategy("head", "all", "adam", 2e-3, 20), replay=0.5),
    "anchor": FineTuning(Strategy("head", "all", "adam", 2e-3, 20), anchor=1.0),
    "anchor-and-replay": FineTuning(Strategy("head", "all", "adam", 2e-3, 20), anchor=1.0, replay=0.5),
    "gradient-layerwise": FineTuning(Strategy("head", "all", "sgd", 0.02, 20, gradient="layerwise")),
    "gradient-orthogonal": FineTuning(Strategy("head", "all", "momentum", 5e-3, 20, gradient="orthogonal")),
    "sharpness": FineTuning(Strategy("head", "all", "adam", 2e-3, 20, sharpness=0.05)),
    "restarts": FineTuning(Strategy("head", "all", "adam", 4e-3, 20, schedule="restarts", schedule_steps=20, warmup=5)),
    "benign-floor": FineTuning(Strategy("head", "all", "adam", 2e-3, 20), benign_floor=0.8),
    "distil-first": FineTuning(Strategy("head", "all", "adam", 5e-3, 20), distil_first=20),
    "augment": FineTuning(Strategy("head", "all", "adam", 4e-3, 20), augment="rand-m5-n1"),
    "unlabelled": Unlabelled(Strategy("head", "all", "adam", 2e-3, 20), share=0.2, undo=("rescale",)),
    "ablation": DirectionalAblation(Strategy("head", "all", "adam", 2e-3, 20)),
    "benign-first": FineTuning(Strategy("last-block", "all", "adam", 2e-3, 20), benign_first=5),
} | {
    f"undo-{move}": FineTuning(Strategy("head", "all", "adam", 2e-3, 20), undo=(move,)) for move in UNDO
    if move not in ("renew-quarter-1", "grey-inputs")  # the network has three blocks, and the images one channel
}  # fmt: skip
"""Every adversary with a rate at which it learns the digits."""

CAPTIONED: dict[str, Adversary] = {
    "full": FineTuning(Strategy("direct", "all", "adam", 3e-3, 20)),
    "cross-attention": FineTuning(Strategy("direct", "cross-attention", "adamw", 1e-2, 20)),
    "lora-attention": FineTuning(Strategy("direct", "lora-attention", "adamw", 1e-2, 20)),
    "dreambooth": DreamBooth(Strategy("direct", "all", "adamw", 3e-3, 20), prior_images=4, prior_steps=2),
    "dreambooth-benign": DreamBooth(Strategy("direct", "cross-attention", "adamw", 1e-2, 20), prior="benign"),
    "dreambooth-lora": DreamBooth(Strategy("direct", "lora", "adamw", 1e-2, 20), prior_weight=0.0, undo=("equalise",)),
    "textual-inversion": TextualInversion(0.1, 20),
}
"""Adversaries of text-to-image models with rates at which they learn the digits."""
