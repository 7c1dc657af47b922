"""Classification over arrays in memory: images or feature vectors, indexed on the device."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.results import TaskFacts
from holdfast.runtime.devices import device_of
from holdfast.tasks.arrays import Array, byte_conversion, class_ranges, resize, to_float, value_range
from holdfast.tasks.base import Batch, Kind, Split, Task

SCORE_BATCH = 500


class ArrayTask(Task):
    """Classification of arrays.

    Args:
        name: shown in reports and errors.
        x_train: images as uint8 of shape (N, H, W) or (N, H, W, C), or feature vectors of shape (N, D).
        y_train: integer labels of shape (N,), in [0, classes).
        x_test: like `x_train`.
        y_test: like `y_train`.
        class_names: one name a class; fixes the number of classes (default: largest training label + 1).

    Raises:
        HoldfastError: naming the array and the value, if shapes disagree, a split is empty, data is not finite, labels
            are out of range, or there is only one class.

    Example:
        >>> task = ArrayTask("toy", np.eye(4), [0, 0, 1, 1], np.eye(4), [0, 0, 1, 1])
        >>> task.input_shape, task.num_outputs, task.chance
        ((4,), 2, 0.5)
    """

    kind: Kind = "classification"
    higher_is_better = True
    min_classes: ClassVar[int] = 2
    labelled: ClassVar[bool] = True
    """Whether files without labels are of no use."""
    source: str = "arrays in memory"
    """Where the data come from, for people."""
    notes: tuple[str, ...] = ()
    """What a loader left out or converted, and why."""
    drawn: bool = False
    """Whether the test split was drawn here, since the source has none."""

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
        for split, inputs in x.items():
            if len(inputs) != len(y[split]):
                raise self._bad(f"x_{split} has {len(inputs)} samples, y_{split} {len(y[split])} labels")
            if len(inputs) == 0:
                raise self._bad(f"the {split} split is empty; give it at least one sample")
        if x["train"].shape[1:] != x["test"].shape[1:]:
            raise self._bad(f"training inputs are {x['train'].shape[1:]}, test inputs {x['test'].shape[1:]}")
        names = list(class_names) if class_names is not None else None
        classes = len(names) if names is not None else int(y["train"].max()) + 1
        if classes > max(1000, len(y["train"])):
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
                source = "class_names" if names is not None else "y_train"
                raise self._bad(
                    f"y_{split} holds label {bad}; expected 0 to {classes - 1} ({classes} classes by {source})"
                )
        if len(np.unique(y["train"])) < self.min_classes:
            raise self._bad("y_train has one class only; a classification task needs at least two")
        self.class_names = names if names is not None else [str(c) for c in range(classes)]
        self._check_classes(y, named=names is not None)
        self._set({s: torch.from_numpy(a) for s, a in x.items()}, {s: torch.from_numpy(a) for s, a in y.items()})

    def _check_classes(self, y: dict[str, Array], *, named: bool) -> None:
        """Refuses names that come twice, and classes that cannot be learned.

        A class that is named and has no samples at all may still be left out by `subset`; see `validate`.
        """
        twice = [n for n in self.class_names if self.class_names.count(n) > 1] if named else []
        if twice:
            raise self._bad(f"two classes are called {twice[0]!r}; give each a name of its own")
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

    def noted(self, source: str, *notes: str, drawn: bool = False) -> Self:
        """Returns this very task, which a loader has just made, with what is to be said about its data.

        Args:
            source: where they come from.
            notes: what was left out or converted.
            drawn: whether the test split was drawn.
        """
        self.source, self.notes, self.drawn = source, (*self.notes, *notes), drawn
        return self

    def _bad(self, what: str) -> HoldfastError:
        return HoldfastError(f"Task {self.name!r}: {what}.")

    def _inputs(self, values: npt.ArrayLike, label: str) -> Array:
        a = np.asarray(values)
        if a.dtype == object or a.dtype.kind not in "uifb":
            raise self._bad(f"{label} has dtype {a.dtype}; expected numbers")
        if a.ndim in (3, 4):
            if a.dtype != np.uint8:
                raise self._bad(
                    f"{label} looks like images {a.shape} but is {a.dtype}, {value_range(a)}; expected uint8, 0 to 255"
                    f"{byte_conversion(a)}"
                )
            a = a[:, None] if a.ndim == 3 else np.moveaxis(a, -1, 1)
            if a.shape[1] not in (1, 3):
                hint = "; move the channels to the end" if a.shape[2] in (1, 3, 4) else ""
                if a.shape[1] in (2, 4):
                    hint = "; put what is transparent on white and drop the last channel"
                raise self._bad(
                    f"{label} has {a.shape[1]} channels in its last axis; expected 1 or 3 (N, H, W, C){hint}"
                )
            return np.ascontiguousarray(a)
        if a.ndim != 2:
            raise self._bad(f"{label} has shape {a.shape}; expected (N, D), (N, H, W) or (N, H, W, C)")
        a = a.astype(np.float32)
        if not np.isfinite(a).all():
            row, column = np.argwhere(~np.isfinite(a))[0]
            raise self._bad(
                f"{label} has {a.size - int(np.isfinite(a).sum())} values that are NaN or infinite "
                f"(first in row {row}, column {column}); fill or drop them"
            )
        return a

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
            raise self._bad(f"{label} has dtype {a.dtype} with values that are no integers; expected class labels")
        return a.astype(np.int64)

    def _set(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        self._x, self._y = x, y
        self._resident: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self.input_shape = tuple(x["train"].shape[1:])
        self.num_outputs = len(self.class_names)
        self.chance = int(torch.bincount(y["test"]).max()) / len(y["test"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resident": {}}  # copies on a device; who gets this has one of its own

    def _with(
        self, name: str, x: dict[str, Tensor], y: dict[str, Tensor], classes: Sequence[str] | None = None
    ) -> Self:
        task = copy.copy(self)
        task.name = name
        task.class_names = list(classes if classes is not None else self.class_names)
        task._set(x, y)
        return task

    def size(self, split: Split) -> int:
        """Returns the number of samples in a split."""
        return len(self._y[split])

    def _on(self, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (split, device)
        if key not in self._resident:
            self._resident[key] = self._x[split].to(device), self._y[split].to(device)
        return self._resident[key]

    def batches(
        self, split: Split, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device
    ) -> Iterator[Batch]:
        """See `Task.batches`; images are scaled to [0, 1] here."""
        if split == "test":
            yield from self.sweep(split, batch_size, device=device)
            return
        x, y = self._on(split, device)
        size = min(batch_size, len(y))
        order = torch.empty(0, dtype=torch.int64)
        while True:
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(y), generator=generator)])
            index, order = order[:size].to(device), order[size:]
            yield Batch(to_float(x[index]), y[index])

    def sweep(self, split: Split, batch_size: int, *, device: torch.device) -> Iterator[Batch]:
        """See `Task.sweep`."""
        x, y = self._on(split, device)
        for start in range(0, len(y), batch_size):
            yield Batch(to_float(x[start : start + batch_size]), y[start : start + batch_size])

    def targets(self, y: Tensor) -> Tensor:
        """See `Task.targets`: one-hot, shape (N, classes)."""
        return F.one_hot(y, self.num_outputs).to(torch.float64)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the cross-entropy of the model's logits, averaged over the batch.

        Raises:
            HoldfastError: for a batch of one sample, if the model normalises over the batch.
        """
        try:
            logits = model(batch.x)
        except ValueError as error:
            if len(batch.y) > 1 or "more than 1 value per channel" not in str(error):
                raise
            raise self._bad(
                "a batch has one sample, and the model's BatchNorm cannot be trained on one; give a batch size of at "
                "least 2"
            ) from error
        return self.loss_of(logits, batch)

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Task.loss_of`."""
        return F.cross_entropy(outputs, batch.y)

    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.score_of`: the share of the batch whose class is found."""
        return float((outputs.detach().argmax(-1) == batch.y).float().mean())

    @torch.no_grad()
    def outcomes(self, model: nn.Module, split: Split = "test") -> Tensor:
        """See `Task.outcomes`: 1 for a sample whose class is found, else 0; their mean is the accuracy."""
        device = device_of(model)
        training = model.training
        model.eval()
        x, y = self._on(split, device)
        parts, finite = [], torch.ones((), dtype=torch.bool, device=device)
        for start in range(0, len(y), SCORE_BATCH):
            logits = model(to_float(x[start : start + SCORE_BATCH]))
            finite &= logits.isfinite().all()
            parts.append(logits.argmax(-1) == y[start : start + SCORE_BATCH])
        model.train(training)
        found = torch.cat(parts).to("cpu", torch.float64)
        return found if finite.item() else torch.full_like(found, torch.nan)

    def subset(self, classes: Sequence[int], shown: Sequence[int] | None = None) -> Self:
        """Keeps some classes, renumbered from 0 in the order given.

        Args:
            classes: their numbers in this task.
            shown: what the new task's name says instead of these numbers.

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

    def _by_class(self, seed: int, split: Split = "train") -> list[Tensor]:
        """Indices of a split's samples of each class, shuffled."""
        generator = torch.Generator().manual_seed(seed)
        found = [(self._y[split] == c).nonzero().flatten() for c in range(self.num_outputs)]
        return [index[torch.randperm(len(index), generator=generator)] for index in found]

    def _group(self, index: int) -> str:
        """What a group of `_by_class` is called in errors."""
        return f"class {self.class_names[index]!r}"

    def _take(self, name: str, train: Tensor, test: Tensor | None = None) -> Self:
        """A task of some of the training samples; `test`, too, indexes the training samples."""
        index = train.sort().values
        x, y = {"train": self._x["train"][index]}, {"train": self._y["train"][index]}
        if test is None:
            x["test"], y["test"] = self._x["test"], self._y["test"]
        else:
            held = test.sort().values
            x["test"], y["test"] = self._x["train"][held], self._y["train"][held]
        return self._with(name, x, y)

    def halves(self, seed: int) -> tuple[Self, Self]:
        """Splits the training samples in two; SOPHON, section 5.1.4.

        One bit of a keyed hash of its input decides a sample's side. So the same image is on the same side in every
        task that holds it, whatever its other classes and their order, and so are its duplicates; about half of every
        class is on each side.

        Raises:
            HoldfastError: if all training samples of a class are on one side.
        """
        key = seed.to_bytes(16, "big", signed=True)
        rows = (self._x["train"] + 0).numpy()  # -0.0 + 0 is 0.0: equal values are equal bytes
        bits = [hashlib.blake2b(row.tobytes(), key=key, digest_size=1).digest()[0] & 1 for row in rows]
        second = torch.tensor(bits, dtype=torch.bool)
        for c, index in enumerate(self._by_class(seed)):
            sides = second[index]
            if sides.all() or not sides.any():
                raise self._bad(
                    f"all {len(sides)} training samples of {self._group(c)} are in the same half; halves "
                    "need one each. Give it more samples, or leave the class out"
                )
        return self._take(self.name, (~second).nonzero().flatten()), self._take(self.name, second.nonzero().flatten())

    def few_shot(self, shots: int, seed: int) -> Self:
        """Keeps `shots` training samples a class.

        Raises:
            HoldfastError: if a class has fewer.
        """
        by_class = self._by_class(seed)
        for c, index in enumerate(by_class):
            if len(index) < shots:
                raise self._bad(
                    f"{shots} shots a class were asked for and {self._group(c)} has {len(index)} training samples; "
                    "lower `shots`"
                )
        return self._take(self.name, torch.cat([i[:shots] for i in by_class]))

    def holdout(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """See `Task.holdout`; at least one sample a class is held out.

        Raises:
            HoldfastError: if a class has too few training samples.
        """
        by_class = self._by_class(seed)
        held = [max(1, round(fraction * len(i))) for i in by_class]
        for c, (index, count) in enumerate(zip(by_class, held, strict=True)):
            if len(index) <= count:
                raise self._bad(f"{self._group(c)} has {len(index)} training samples: too few to hold {count} out")
        rest = torch.cat([i[n:] for i, n in zip(by_class, held, strict=True)])
        out = torch.cat([i[:n] for i, n in zip(by_class, held, strict=True)])
        return self._take(self.name, rest), self._take(f"{self.name} (held out)", rest, out)

    def limit_train(self, samples: int, seed: int) -> Self:
        """Keeps about `samples` training samples, the same share of every class."""
        if samples >= self.size("train"):
            return self
        share = samples / self.size("train")
        return self._take(self.name, torch.cat([i[: max(1, round(share * len(i)))] for i in self._by_class(seed)]))

    def limit_test(self, samples: int, seed: int) -> Self:
        """Keeps about `samples` test samples, the same share of every class: a cheaper, coarser score."""
        if samples >= self.size("test"):
            return self
        share = samples / self.size("test")
        index = torch.cat([i[: max(1, round(share * len(i)))] for i in self._by_class(seed, "test") if len(i)])
        index = index.sort().values
        x = {"train": self._x["train"], "test": self._x["test"][index]}
        return self._with(self.name, x, {"train": self._y["train"], "test": self._y["test"][index]})

    def as_images(self, size: int | None = None, channels: int | None = None) -> Self:
        """Resizes images (bilinear, antialiased) and repeats or averages channels, once, as uint8.

        Args:
            size: pixels a side; None keeps it.
            channels: 1 or 3; None keeps it.

        Raises:
            HoldfastError: if the inputs are no images, or `channels` is neither 1 nor 3.
        """
        if len(self.input_shape) != 3:
            raise self._bad(f"inputs of shape {self.input_shape} are no images; leave image_size and channels out")
        if channels not in (None, 1, 3):
            raise self._bad(f"channels is {channels}; expected 1 or 3")
        x = {s: resize(v, size, channels) for s, v in self._x.items()}
        return self._with(self.name, x, self._y)

    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """See `Task.with_inputs`."""
        for split, x in (("train", train), ("test", test)):
            if len(x) != len(self._y[split]):
                raise self._bad(f"{len(x)} other inputs were given for {len(self._y[split])} {split} samples")
        return self._with(self.name, {"train": train.cpu(), "test": test.cpu()}, self._y)

    def hashes(self, split: Split) -> list[bytes]:
        """Returns a hash of each input of a split; equal inputs have equal ones, in every task."""
        rows = self._x[split]
        plain = (rows if rows.dtype == torch.uint8 else rows + 0).contiguous().numpy()  # -0.0 + 0 is 0.0
        head = f"{rows.dtype}{tuple(rows.shape[1:])}".encode()
        return [hashlib.blake2b(row.tobytes(), key=head[:64], digest_size=16).digest() for row in plain]

    def answers(self, split: Split) -> list[float]:
        """Returns the label or target of each sample of a split."""
        found: list[float] = self._y[split].tolist()
        return found

    def value_range(self) -> tuple[float, float]:
        """Returns the smallest and the largest value of all inputs."""
        return (
            float(min(x.min() for x in self._x.values())),
            float(max(x.max() for x in self._x.values())),
        )

    def facts(self) -> TaskFacts:
        """See `Task.facts`; the hash is over dtype, shape and bytes of the four arrays."""
        digest = hashlib.sha256()
        for tensor in (self._x["train"], self._y["train"], self._x["test"], self._y["test"]):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return TaskFacts(
            name=self.name,
            sha256=digest.hexdigest(),
            train=self.size("train"),
            test=self.size("test"),
            classes=self.num_outputs,
        )
