"""Classification over arrays in memory: images, feature vectors or sounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.losses import distillation_loss
from holdfast.tasks.arrays import Array, class_ranges
from holdfast.tasks.base import Batch, Split
from holdfast.tasks.in_memory import InMemoryTask


class ArrayTask(InMemoryTask):
    """Classification of images, feature vectors or sounds.

    Args:
        name: shown in reports and errors.
        x_train: images as uint8 of shape (N, H, W) or (N, H, W, C), or feature vectors of shape (N, D).
        y_train: integer labels of shape (N,), in [0, classes).
        x_test: like `x_train`.
        y_test: like `y_train`.
        class_names: one name a class; sets the number of classes (default: largest training label + 1).

    Raises:
        HoldfastError: naming the array and the value, if shapes disagree, a split is empty, data is not finite, labels
            are out of range, or there is only one class.

    Example:
        >>> task = ArrayTask("toy", np.eye(4), [0, 0, 1, 1], np.eye(4), [0, 0, 1, 1])
        >>> task.input_shape, task.num_outputs, task.chance
        ((4,), 2, 0.5)
    """

    kind = "classification"
    higher_is_better = True
    labels_are_classes = True
    suppression_losses: ClassVar[tuple[str, ...]] = ("ice", "klu", "released", "ce-ascent")
    min_classes: ClassVar[int] = 2
    labelled: ClassVar[bool] = True
    """Whether the data must have labels."""

    def __init__(
        self,
        name: str,
        x_train: npt.ArrayLike,
        y_train: npt.ArrayLike,
        x_test: npt.ArrayLike,
        y_test: npt.ArrayLike,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        x = {"train": self._inputs(x_train, "x_train"), "test": self._inputs(x_test, "x_test")}
        y = {"train": self._labels(y_train, "y_train"), "test": self._labels(y_test, "y_test")}
        self._check_lengths(x, y, "labels")
        names = list(class_names) if class_names is not None else None
        classes = len(names) if names is not None else int(y["train"].max()) + 1
        self._check_range(y, classes, "y_train" if names is None else "class_names")
        if len(np.unique(y["train"])) < self.min_classes:
            raise self._bad("y_train has one class only; a classification task needs at least two")
        self.class_names = names if names is not None else [str(c) for c in range(classes)]
        self._check_classes(y, named=names is not None)
        self._set({s: torch.from_numpy(a) for s, a in x.items()}, {s: torch.from_numpy(a) for s, a in y.items()})

    def _check_range(self, y: dict[str, Array], classes: int, source: str) -> None:
        """Refuses labels outside of 0 to `classes` - 1; `source` names the origin of the number of classes."""
        if source == "y_train" and classes > max(1000, len(y["train"])):
            raise self._bad(
                f"y_train holds label {classes - 1} and has {len(y['train'])} samples; number the classes from 0 on"
            )
        for split, labels in y.items():
            if labels.min() < 0 or labels.max() >= classes:
                bad = int(labels.min() if labels.min() < 0 else labels.max())
                if bad == -1:
                    raise self._bad(
                        f"y_{split} holds label -1, which often marks samples without a label (as in the test splits "
                        "of GLUE); drop them, or take a split that has labels"
                    )
                raise self._bad(
                    f"y_{split} holds label {bad}; expected 0 to {classes - 1} ({classes} classes by {source})"
                )

    def _check_classes(self, y: dict[str, Array], *, named: bool) -> None:
        """Refuses duplicate names, and classes without training samples.

        A named class without any samples is allowed here, as `subset` may still leave it out; see `validate`.
        """
        twice = [n for n, count in Counter(self.class_names).items() if count > 1] if named else []
        if twice:
            raise self._bad(f"two classes are called {twice[0]!r}; give each its own name")
        if not self.labelled:
            return
        learned, tested = (np.bincount(y[s], minlength=len(self.class_names)) for s in ("train", "test"))
        for c in np.flatnonzero((learned == 0) & (tested > 0 if named else True)):
            if not named and c == 0:
                raise self._bad(
                    f"no training sample has label 0, and labels go up to {len(self.class_names) - 1}; number the "
                    "classes from 0 on, or give class_names"
                )
            raise self._bad(
                f"class {self.class_names[c]!r} (label {c}) has no training samples, and {tested[c]} test samples; "
                "add some to train on, or leave the class out"
            )

    def _labels(self, values: npt.ArrayLike, label: str) -> Array:
        a = np.asarray(values)
        if a.ndim != 1:
            one_hot = a.ndim == 2 and a.shape[1] > 1
            how = (
                f" (one-hot: store {label}.argmax(1))" if one_hot else f" (store {label}[:, 0])" if a.ndim == 2 else ""
            )
            raise self._bad(f"{label} has shape {a.shape}; expected (N,), one integer a sample{how}")
        if a.dtype.kind in "USO":
            raise self._bad(
                f"{label} holds words, such as {str(a[0]) if len(a) else ''!r}; expected integers from 0 on, and the "
                f"words as class_names: class_names, {label} = np.unique(labels.astype(str), return_inverse=True)"
            )
        if a.dtype.kind not in "uib" and not (a.dtype.kind == "f" and np.isfinite(a).all() and (a == a.round()).all()):
            raise self._bad(f"{label} has dtype {a.dtype} and values that are not integers; expected class labels")
        return a.astype(np.int64)

    def _set(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        super()._set(x, y)
        self.num_outputs = len(self.class_names)
        self.chance = int(torch.bincount(y["test"]).max()) / len(y["test"])

    def targets(self, y: Tensor) -> Tensor:
        """See `Task.targets`: one-hot, shape (N, classes)."""
        return F.one_hot(y, self.num_outputs).to(torch.float64)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Task.loss_of`."""
        return F.cross_entropy(outputs, batch.y)

    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.score_of`: the accuracy."""
        return float((outputs.detach().argmax(-1) == batch.y).float().mean())

    def outcomes_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns whether each sample is classified correctly; the mean is the accuracy."""
        return outputs.argmax(-1) == batch.y

    def smoothed_loss_of(self, outputs: Tensor, batch: Batch, smoothing: float) -> Tensor:
        """See `Task.smoothed_loss_of`."""
        return F.cross_entropy(outputs, batch.y, label_smoothing=smoothing)

    def distance(self, outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        """See `Task.distance`: between class distributions."""
        return distillation_loss(outputs, wanted, temperature)

    def batch_skill(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.batch_skill`: the accuracy."""
        return float((outputs.argmax(1) == batch.y).double().mean())

    def counts(self, split: Split) -> list[int]:
        """See `InMemoryTask.counts`."""
        return torch.bincount(self._y[split], minlength=len(self.class_names)).tolist()

    def constant_scores(self) -> list[float]:
        """See `Task.constant_scores`: the share of each class in the test split."""
        counts = self.counts("test") if self.labels_are_classes else []
        return [count / sum(counts) for count in counts]

    def same_answers(self, other: Self, pairs: Sequence[tuple[Hashable, Hashable]]) -> bool:
        """See `InMemoryTask.same_answers`; classes may be numbered in another order."""
        matched = set(pairs)
        return len(matched) == len({ours for ours, _ in matched}) == len({theirs for _, theirs in matched})

    def check_classes(self) -> None:
        """See `Task.check_classes`."""
        for label, count in enumerate(self.counts("train")):
            if not count:
                raise self._bad(
                    f"class {self.class_names[label]!r} (label {label}) has no training samples; add some, or keep the "
                    "other classes with [...]"
                )

    def _by_class(self, seed: int, split: Split = "train") -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        classes = [(self._y[split] == c).nonzero().flatten() for c in range(self.num_outputs)]
        return [index[torch.randperm(len(index), generator=generator)] for index in classes]

    def _group(self, index: int) -> str:
        return f"class {self.class_names[index]!r}"

    def subset(self, classes: Sequence[int], shown: Sequence[int] | None = None) -> Self:
        """Keeps some classes, renumbered from 0 in the order given.

        Args:
            classes: their numbers in this task.
            shown: the numbers in the new task's name, if they differ.

        Raises:
            HoldfastError: if a class does not exist, comes twice, or fewer than two are left.
        """
        wrong = [c for c in classes if not 0 <= c < len(self.class_names)]
        if wrong:
            raise self._bad(f"there is no class {wrong[0]}; it has classes 0 to {len(self.class_names) - 1}")
        if len(set(classes)) < max(self.min_classes, len(classes)):
            least = "one" if self.min_classes == 1 else "two"
            raise self._bad(f"cannot keep classes {list(classes)}; give at least {least}, each once")
        new = torch.full((len(self.class_names),), -1)
        new[torch.tensor(classes)] = torch.arange(len(classes))
        keep = {s: new[y] >= 0 for s, y in self._y.items()}
        for split, kept in keep.items():
            if not kept.any():
                raise self._bad(f"no {split} sample has one of the classes {list(classes)}")
        return self._with(
            f"{self.name}[{class_ranges(classes if shown is None else shown)}]",
            {s: self._x[s][keep[s]] for s in keep},
            {s: new[self._y[s][keep[s]]] for s in keep},
            [self.class_names[c] for c in classes],
        )
