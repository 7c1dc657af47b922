"""Tasks whose samples are arrays in memory: storage, batches, splits and hashes for every kind of task."""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.results import TaskFacts
from holdfast.runtime.devices import device_of
from holdfast.tasks.arrays import Array, byte_conversion, resize, to_float, value_range
from holdfast.tasks.base import Batch, Split, Task

SCORE_BATCH = 500


class InMemoryTask(Task):
    """A task over arrays in memory, which are indexed on the device.

    A new kind of such a task writes `__init__`, which ends in `_set`, and `targets`, `loss_of`, `score_of` and
    `outcomes_of`; if samples have classes, also `_by_class`.

    Attributes:
        class_names: names of the outputs.
        source: where the data come from, for people.
        notes: what a loader left out or converted, and why.
        drawn: whether the test split was drawn from a source that has none.
    """

    class_names: list[str]
    source: str = "arrays in memory"
    notes: tuple[str, ...] = ()
    drawn: bool = False

    def noted(self, source: str, *notes: str, drawn: bool = False) -> Self:
        """Sets `source`, `notes` and `drawn` of a task that a loader has just made, and returns it.

        Args:
            source: see `InMemoryTask`.
            notes: are added to those of the task.
            drawn: see `InMemoryTask`.
        """
        self.source, self.notes, self.drawn = source, (*self.notes, *notes), drawn
        return self

    def _bad(self, problem: str) -> HoldfastError:
        return HoldfastError(f"Task {self.name!r}: {problem}.")

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
                    hint = "; put transparent pixels on white and drop the last channel"
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

    def _set(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        """Takes the samples; a kind also sets `num_outputs` and `chance` here."""
        self._x, self._y = x, y
        self._resident: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self.input_shape = tuple(x["train"].shape[1:])

    def _check_lengths(self, x: Mapping[str, Array], y: Mapping[str, Array], what: str) -> None:
        for split, inputs in x.items():
            if len(inputs) != len(y[split]):
                raise self._bad(f"x_{split} has {len(inputs)} samples, y_{split} {len(y[split])} {what}")
            if len(inputs) == 0:
                raise self._bad(f"the {split} split is empty; give it at least one sample")
        if x["train"].shape[1:] != x["test"].shape[1:]:
            raise self._bad(f"training inputs are {x['train'].shape[1:]}, test inputs {x['test'].shape[1:]}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resident": {}}  # copies on a device are not pickled

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

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the loss of the model's outputs, averaged over the batch.

        Raises:
            HoldfastError: for a batch of one sample, if the model normalizes over the batch.
        """
        try:
            outputs = model(self._entered(model, batch.x))
        except ValueError as error:
            if len(batch.y) > 1 or "more than 1 value per channel" not in str(error):
                raise
            raise self._bad(
                "a batch has one sample, and the model's BatchNorm cannot be trained on one; give a batch size of at "
                "least 2"
            ) from error
        return self.loss_of(outputs, batch)

    def _entered(self, model: nn.Module, x: Tensor) -> Tensor:
        """The inputs as the model takes them; a kind may convert them."""
        return x

    @abstractmethod
    def outcomes_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns each sample's contribution to the score: shape (N,)."""

    @torch.no_grad()
    def outcomes(self, model: nn.Module, split: Split = "test") -> Tensor:
        """See `Task.outcomes`."""
        device, training = device_of(model), model.training
        model.eval()
        parts, finite = [], torch.ones((), dtype=torch.bool, device=device)
        for batch in self.sweep(split, SCORE_BATCH, device=device):
            outputs = model(self._entered(model, batch.x))
            finite &= outputs.isfinite().all()
            parts.append(self.outcomes_of(outputs, batch))
        model.train(training)
        outcomes = torch.cat(parts).to("cpu", torch.float64)
        return outcomes if finite.item() and bool(outcomes.isfinite().all()) else torch.full_like(outcomes, torch.nan)

    def _by_class(self, seed: int, split: Split = "train") -> list[Tensor]:
        """Indices of a split's samples, shuffled, one tensor a class; here all samples count as one class."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randperm(len(self._y[split]), generator=generator)]

    def _group(self, index: int) -> str:
        """Name of a group of `_by_class` in messages."""
        return "the whole task, which counts as one class,"

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

        One bit of a keyed hash of its input decides a sample's side. So an image and its duplicates are on the same
        side in every task, whatever the other classes are, and about half of every class is on each side.

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
                    f"all {len(sides)} training samples of {self._group(c)} are in the same half, and each half needs "
                    "one. Give it more samples, or leave the class out"
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
                    f"shots is {shots}, and {self._group(c)} has {len(index)} training samples; lower `shots`"
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

    def _share(self, split: Split, samples: int, seed: int) -> Tensor:
        """Indices of about `samples` samples, the same share of every class."""
        share = samples / self.size(split)
        return torch.cat([i[: max(1, round(share * len(i)))] for i in self._by_class(seed, split)])

    def limit_train(self, samples: int, seed: int) -> Self:
        """Keeps about `samples` training samples, the same share of every class."""
        if samples >= self.size("train"):
            return self
        return self._take(self.name, self._share("train", samples, seed))

    def limit_test(self, samples: int, seed: int) -> Self:
        """Keeps about `samples` test samples, the same share of every class: a cheaper, coarser score."""
        if samples >= self.size("test"):
            return self
        index = self._share("test", samples, seed).sort().values
        x = {"train": self._x["train"], "test": self._x["test"][index]}
        return self._with(self.name, x, {"train": self._y["train"], "test": self._y["test"][index]})

    def as_images(self, size: int | None = None, channels: int | None = None) -> Self:
        """Resizes images (bilinear, antialiased) and repeats or averages channels, once, as uint8.

        Args:
            size: pixels a side; None keeps it.
            channels: 1 or 3; None keeps it.

        Raises:
            HoldfastError: if the inputs are not images, or `channels` is neither 1 nor 3.
        """
        if len(self.input_shape) != 3:
            raise self._bad(f"inputs of shape {self.input_shape} are not images; leave image_size and channels out")
        if channels not in (None, 1, 3):
            raise self._bad(f"channels is {channels}; expected 1 or 3")
        return self._with(self.name, {s: resize(v, size, channels) for s, v in self._x.items()}, self._y)

    def inverted(self) -> Self:
        """Inverts the pixels of images: 255 - x.

        Raises:
            HoldfastError: if the inputs are no images of uint8.
        """
        if len(self.input_shape) != 3 or any(v.dtype != torch.uint8 for v in self._x.values()):
            raise self._bad(f"inputs of shape {self.input_shape} are no images of 0 to 255; leave invert out")
        return self._with(self.name, {s: 255 - v for s, v in self._x.items()}, self._y)

    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """See `Task.with_inputs`."""
        for split, x in (("train", train), ("test", test)):
            if len(x) != len(self._y[split]):
                raise self._bad(f"{len(x)} other inputs were given for {len(self._y[split])} {split} samples")
        return self._with(self.name, {"train": train.cpu(), "test": test.cpu()}, self._y)

    def hashes(self, split: Split) -> list[bytes]:
        """Returns a hash of each input of a split; equal inputs have equal hashes in every task."""
        rows = self._x[split]
        plain = (rows if rows.dtype == torch.uint8 else rows + 0).contiguous().numpy()  # -0.0 + 0 is 0.0
        head = f"{rows.dtype}{tuple(rows.shape[1:])}".encode()
        return [hashlib.blake2b(row.tobytes(), key=head[:64], digest_size=16).digest() for row in plain]

    def answers(self, split: Split) -> list[Hashable]:
        """Returns the label or target of each sample of a split."""
        answers: list[Hashable] = self._y[split].tolist()
        return answers if self._y[split].dim() == 1 else [str(answer) for answer in answers]

    def counts(self, split: Split) -> list[int]:
        """Returns the number of samples of each class in a split; empty if samples have no classes."""
        return []

    def same_answers(self, other: Self, pairs: Sequence[tuple[Hashable, Hashable]]) -> bool:
        """Whether this task and another have equivalent answers for the same inputs.

        Args:
            other: of the same kind.
            pairs: this task's answer and the other's, for each input.
        """
        return all(ours == theirs for ours, theirs in pairs)

    def value_range(self) -> tuple[float, float]:
        """Returns the smallest and the largest value of all inputs."""
        return float(min(x.min() for x in self._x.values())), float(max(x.max() for x in self._x.values()))

    def facts(self) -> TaskFacts:
        """See `Task.facts`; the hash is over dtype, shape and bytes of the four arrays."""
        digest = hashlib.sha256()
        for tensor in (self._x["train"], self._y["train"], self._x["test"], self._y["test"]):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        sizes = {"train": self.size("train"), "test": self.size("test"), "classes": self.num_outputs}
        return TaskFacts(name=self.name, sha256=digest.hexdigest(), **sizes)
