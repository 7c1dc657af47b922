"""Conditioning of a linear probe on a deep network, before and after immunization: RIR_theta0, Eq. 17.

With X~(theta) the features of some samples, the Hessian of a linear probe on them is H~(theta) = X~'X~ (Eq. 18,
uncentred), and with theta_0 the original and theta_I the immunized network

    RIR_theta0 = (kappa(H~_H(theta_I)) / kappa(H~_H(theta_0))) / (kappa(H~_P(theta_I)) / kappa(H~_P(theta_0)))

is (i), which should be large, over (ii), which should be at most 1. As in the paper it is computed on groups of samples
(20 of 100): X~ is then 100 x D, and its smaller side is decomposed.

**Precision.** In float32, rounding gives small values to directions that a network does not use, and they determine
kappa. So copies of the networks run in float64, and singular values are those of X~ itself, since X~'X~ would square
the condition number. Groups whose rank differs between the two networks are counted: their kappas are over different
directions, and the ratio is not meaningful.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, check_feature_width
from holdfast.models.introspection import first_line
from holdfast.runtime.run import derive_seed
from holdfast.spectral.condition_numbers import spectrum
from holdfast.spectral.frontier import Frontier
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import Task
from holdfast.tasks.base import Split

BATCH = 250


class GroupSpectra(BaseModel):
    """Spectra of a linear probe's Hessian on groups of samples of two tasks, behind one network.

    Attributes:
        benign: kappa of each group of the benign task; None where it is not finite, or all features are zero.
        restricted: likewise of the restricted task.
        benign_ranks: rank of the benign features of each group.
        restricted_ranks: likewise of the restricted features.
        bounds: RIR* of each pair of groups, the bound for linear extractors before the head on these samples. None
            where the features of the two groups do not span the same directions, and there is no bound.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    benign: tuple[float | None, ...]
    restricted: tuple[float | None, ...]
    benign_ranks: tuple[int, ...]
    restricted_ranks: tuple[int, ...]
    bounds: tuple[float | None, ...]


class GroupRatios(BaseModel):
    """Eq. 17 on groups of samples.

    Attributes:
        restricted: (i) of each group, should be above 1; None where it is not defined.
        benign: (ii) of each group, should be at most 1.
        restricted_ranks: groups in which the restricted features' rank changed, each as (before, after).
        benign_ranks: likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    restricted: tuple[float | None, ...]
    benign: tuple[float | None, ...]
    restricted_ranks: tuple[tuple[int, int], ...] = ()
    benign_ranks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, original: GroupSpectra, immunized: GroupSpectra) -> Self:
        """Compares an immunized network with the original, group by group.

        Example:
            >>> ranks = {"benign_ranks": (2,), "restricted_ranks": (2,), "bounds": (None,)}
            >>> before = GroupSpectra(benign=(4.0,), restricted=(3.0,), **ranks)
            >>> GroupRatios.of(before, GroupSpectra(benign=(2.0,), restricted=(9.0,), **ranks)).rir
            (6.0,)
        """
        return cls(
            restricted=_ratios(immunized.restricted, original.restricted),
            benign=_ratios(immunized.benign, original.benign),
            restricted_ranks=_changed_ranks(original.restricted_ranks, immunized.restricted_ranks),
            benign_ranks=_changed_ranks(original.benign_ranks, immunized.benign_ranks),
        )

    @property
    def rir(self) -> tuple[float | None, ...]:
        """(i) / (ii) of each group."""
        return _ratios(self.restricted, self.benign)

    @property
    def immunized(self) -> int:
        """Number of groups with (i) above 1 and (ii) at most 1, up to rounding."""
        pairs = zip(self.restricted, self.benign, strict=True)
        return sum(r is not None and b is not None and r > 1 + 1e-9 and b <= 1 + 1e-9 for r, b in pairs)


def relative_conditioning(
    original: SplitModel,
    immunized: SplitModel,
    benign: Task,
    restricted: Task,
    *,
    groups: int = 20,
    samples: int = 100,
    seed: int = 0,
) -> GroupRatios:
    """Returns RIR_theta0 (Eq. 17) and its parts, on the same groups of samples for both networks.

    Args:
        original: theta_0; not changed.
        immunized: theta_I; not changed.
        benign: the benign task; its *test* split is used, which no defense trains on.
        restricted: the adversary's half of the restricted task, which no defense trains on; its *training* split is
            used.
        groups: number of groups; 20 in the paper.
        samples: number of samples in a group, drawn without replacement; 100 in the paper.
        seed: of the draw.

    Raises:
        HoldfastError: for numbers out of range, too few samples, tasks whose samples have no vector of features, or a
            network that cannot compute in float64.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
        >>> _ = torch.manual_seed(0)
        >>> original = load_model("cnn", benign)
        >>> immunized = original.clone()
        >>> theta = torch.diag(torch.logspace(0, -3, 64, dtype=torch.float64))
        >>> _ = immunized.insert_extractor(theta)
        >>> found = relative_conditioning(original, immunized, benign, restricted, groups=3)
        >>> len(found.rir), all(ratio > 1 for ratio in found.restricted)
        (3, True)
        >>> set(relative_conditioning(original, original, benign, restricted, groups=3).rir)
        {1.0}
    """
    settings: dict[str, Any] = {"groups": groups, "samples": samples, "seed": seed}
    before, after = (group_spectra(model, benign, restricted, **settings) for model in (original, immunized))
    return GroupRatios.of(before, after)


def group_spectra(
    model: SplitModel, benign: Task, restricted: Task, *, groups: int = 20, samples: int = 100, seed: int = 0
) -> GroupSpectra:
    """Returns the condition numbers of one network's probes; see `relative_conditioning` for arguments and errors."""
    check_groups(benign, restricted, groups=groups, samples=samples)
    check_feature_width(model, benign)
    twin = _in_float64(model)
    p = grouped_features(twin, benign, "test", draw_groups(benign, "test", groups, samples, seed))
    h = grouped_features(twin, restricted, "train", draw_groups(restricted, "train", groups, samples, seed))
    of_p, of_h = ([_kappa(x) for x in features] for features in (p, h))
    return GroupSpectra(
        benign=tuple(kappa for kappa, _ in of_p),
        restricted=tuple(kappa for kappa, _ in of_h),
        benign_ranks=tuple(rank for _, rank in of_p),
        restricted_ranks=tuple(rank for _, rank in of_h),
        bounds=tuple(map(_bound, p, h)),
    )


def check_groups(benign: Task, restricted: Task, *, groups: int, samples: int) -> None:
    """Checks the arguments of `relative_conditioning` before any work, and raises the same errors."""
    if groups < 1 or samples < 2:
        raise HoldfastError(
            f"Conditioning has {groups} groups of {samples} samples; expected at least 1 group of at least 2."
        )
    sources: tuple[tuple[Task, Split], ...] = ((benign, "test"), (restricted, "train"))
    for task, split in sources:
        if task.no_features is not None:
            raise HoldfastError(
                f"A probe's condition number needs a feature vector per sample, and {task.described} has none: "
                f"{task.no_features}. Leave it out."
            )
        size = task.size(split)
        if size < samples:
            raise HoldfastError(
                f"A group has {samples} samples, but the {split} split of {task.name!r} has only {size}; lower "
                "`samples`, or use more data."
            )


def draw_groups(task: Task, split: Split, groups: int, samples: int, seed: int) -> Tensor:
    """Returns indices into a split, shape (groups, samples), drawn without replacement within each group."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "groups", split))
    size = task.size(split)
    return torch.stack([torch.randperm(size, generator=generator)[:samples] for _ in range(groups)])


@torch.no_grad()
def grouped_features(model: SplitModel, task: Task, split: Split, indices: Tensor) -> Tensor:
    """Returns the features of groups of samples; a sample in several groups is computed once.

    Args:
        model: in float64 and in evaluation mode.
        task: the data.
        split: "train" or "test".
        indices: of samples in the split, shape (groups, samples).

    Returns:
        Shape (groups, samples, D), float64.
    """
    wanted, inverse = torch.unique(indices, return_inverse=True)
    features, begin = [], 0
    for batch in task.sweep(split, BATCH, device=model.device):
        end = begin + len(batch.x)
        inside = wanted[(wanted >= begin) & (wanted < end)] - begin
        if len(inside):
            features.append(_features(model, batch.x[inside.to(batch.x.device)]))
        begin = end
    return torch.cat(features)[inverse]


def _in_float64(model: SplitModel) -> SplitModel:
    twin = model.clone().eval()
    if twin.device.type == "mps":  # which has no float64
        twin = twin.to("cpu")
    twin.precision = None
    return twin.to(torch.float64)


def _features(model: SplitModel, x: Tensor) -> Tensor:
    try:
        features = model.features(x)
    except Exception as error:  # the user's code may raise anything
        raise HoldfastError(
            f"{model.name} cannot compute in float64 ({first_line(error)}), and in float32 the condition number is "
            "that of its rounding; let its code follow the precision of its weights."
        ) from error
    if features.dtype != torch.float64:
        raise HoldfastError(
            f"{model.name}: features are {features.dtype} though all weights are float64, so its code fixes a "
            "precision; condition numbers would be those of its rounding. Let its code follow the precision of its "
            "weights."
        )
    return features.to("cpu")


def _kappa(x: Tensor) -> tuple[float | None, int]:
    if not bool(x.isfinite().all()):
        return None, 0
    values = spectrum(x)
    return (values.hessian_condition, values.rank) if values.rank else (None, 0)


def _bound(benign: Tensor, restricted: Tensor) -> float | None:
    """Returns RIR* on two groups of samples; None if they do not span the same directions."""
    both = torch.cat([benign, restricted])
    if not bool(both.isfinite().all()):
        return None
    alive = both.abs().amax(0) > 0  # features that are zero for all samples do not count
    problems = [LeastSquares.of(x[:, alive]) for x in (benign, restricted)]
    width = int(alive.sum())
    if not width or any(problem.spectrum.rank < width for problem in problems):
        return None
    return Frontier.of(*problems).bound


def _ratios(over: tuple[float | None, ...], under: tuple[float | None, ...]) -> tuple[float | None, ...]:
    pairs = zip(over, under, strict=True)
    ratios = (a / b if a is not None and b is not None else None for a, b in pairs)
    return tuple(r if r is not None and math.isfinite(r) else None for r in ratios)


def _changed_ranks(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a, b in zip(before, after, strict=True) if a != b)
