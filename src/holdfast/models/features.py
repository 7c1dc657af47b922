"""Features, the inputs of the head: those of a task's samples, in order, for linear probes and linear defenses.

A battery's probes, a linear defense and a feasibility study use the same features repeatedly. The cache keeps the last
ones, so that a network is run once over a task: see `FeatureCache`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models.split_model import SplitModel
from holdfast.runtime.devices import place_of_float64
from holdfast.runtime.run import fingerprint
from holdfast.tasks import Task
from holdfast.tasks.base import Split

BATCH = 500
CPU = torch.device("cpu")

KEPT_BYTES = 1 << 30
"""Memory of the cache, in bytes: 20 times the features of CIFAR-10 before the head of a ResNet-20."""

Key = tuple[str, ...]
XY = tuple[Tensor, Tensor]


class FeatureCache:
    """Keeps the features and targets of the tasks last used, up to a number of bytes; the least recently used go first.

    Args:
        limit: in bytes; an entry that is larger is not kept.

    Attributes:
        hits: how often `get` had an entry.
        misses: how often it had none.

    Example:
        >>> cache = FeatureCache(limit=100)
        >>> for name in "abc":
        ...     cache.put((name,), (torch.zeros(5, dtype=torch.float64), torch.zeros(0)))  # 40 bytes
        >>> cache.get(("a",)), cache.get(("c",))[0].shape, cache.bytes
        (None, torch.Size([5]), 80)
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit = limit
        self.hits = self.misses = 0
        self._kept: OrderedDict[Key, XY] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Size of all entries."""
        return sum(map(size_of, self._kept.values()))

    def get(self, key: Key) -> XY | None:
        """Returns the entry of a key, or None; it is shared, so do not write into it."""
        entry = self._kept.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return entry

    def put(self, key: Key, entry: XY) -> None:
        """Keeps features and targets, and drops others to make room."""
        if size_of(entry) > self.limit:
            return
        self._kept[key] = entry
        self._kept.move_to_end(key)
        while self.bytes > self.limit:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Drops all entries and resets the counts."""
        self._kept.clear()
        self.hits = self.misses = 0


KEPT = FeatureCache()
"""The cache of this process."""


def size_of(entry: XY) -> int:
    """Returns the bytes of features and targets."""
    return sum(t.numel() * t.element_size() for t in entry)


@torch.no_grad()
def _key(model: SplitModel, task: Task) -> Key:
    """All that features depend on, beside the split; those of 8 samples stand for the network's code."""
    device, training = model.device, model.training
    sample = model.eval().features(next(task.sweep("train", 8, device=device)).x).flatten().tolist()
    model.train(training)
    data = task.facts()
    return model.facts().sha256, data.sha256, str(data.classes), str(device), fingerprint(sample)


@torch.no_grad()
def feature_batches(model: SplitModel | None, task: Task, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields features and least-squares targets of a split, a batch at a time, in evaluation mode.

    A model's features are taken from the cache, or kept there once all were yielded, if there is room.

    Args:
        model: on the device to compute on; None: the inputs themselves, flattened (images in [0, 1]).
        task: the data.
        split: "train" or "test".

    Yields:
        Features of shape (N, D) and targets of shape (N, C), both float64; see `Task.targets`.

    Example:
        >>> from holdfast.tasks import load_task
        >>> x, y = next(feature_batches(None, load_task("digits[0-4]"), "test"))
        >>> x.shape, y.shape
        (torch.Size([223, 64]), torch.Size([223, 5]))
    """
    if model is None:
        yield from _computed(model, task, split)
        return
    key = (*_key(model, task), split)
    kept = KEPT.get(key)
    if kept is not None:
        yield from zip(*(torch.split(t, BATCH) for t in kept), strict=True)
        return
    parts: list[XY] | None = []
    for part in _computed(model, task, split):
        if parts is not None:
            parts.append(part)
            parts = parts if sum(map(size_of, parts)) <= KEPT.limit else None
        yield part
    if parts is not None:
        KEPT.put(key, _joined(parts))


def _joined(parts: list[XY]) -> XY:
    x, y = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(y)


@torch.no_grad()
def _computed(model: SplitModel | None, task: Task, split: Split) -> Iterator[XY]:
    device = CPU if model is None else model.device
    training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        for batch in task.sweep(split, BATCH, device=device):
            x = batch.x.flatten(1) if model is None else model.features(batch.x)
            place = place_of_float64(device)
            yield x.to(place).to(torch.float64), task.targets(batch.y.to(place))
    finally:
        if model is not None:
            model.train(training)


def features(model: SplitModel | None, task: Task, split: Split) -> tuple[Tensor, Tensor]:
    """Returns all features and targets of a split; see `feature_batches`. The cache may share them: do not write."""
    if model is None:
        return _joined(list(_computed(model, task, split)))
    return _kept(model, task, split, _key(model, task))


def both_splits(model: SplitModel, task: Task) -> tuple[Tensor, Tensor]:
    """Returns the features of the training and of the test split, as `features` does, and computes the key once."""
    key = _key(model, task)
    return _kept(model, task, "train", key)[0], _kept(model, task, "test", key)[0]


def _kept(model: SplitModel, task: Task, split: Split, key: Key) -> XY:
    entry = KEPT.get((*key, split))
    if entry is None:
        entry = _joined(list(_computed(model, task, split)))
        KEPT.put((*key, split), entry)
    return entry


def feature_precision(model: SplitModel | None, task: Task) -> float:
    """Returns the machine epsilon of the features: that of the network's dtype, or of the inputs' own."""
    dtype = model.dtype if model is not None else next(task.sweep("train", 1, device=CPU)).x.dtype
    return torch.finfo(dtype).eps


@torch.no_grad()
def check_feature_width(model: SplitModel | None, task: Task) -> None:
    """Refuses a head that gets a map over positions, not a vector: a linear extractor would mix the positions.

    Args:
        model: None: inputs are the features.
        task: the model's own.

    Raises:
        HoldfastError: if a sample has more features than the head takes, or the task has no features.
    """
    if task.no_features is not None:
        raise HoldfastError(
            f"Linear extractors and spectra need a vector of features a sample, which {task.described} does not have: "
            f"{task.no_features}. For denoisers there are sophon and trajectory-erasure; for text-to-image models also "
            "imma-diffusion and concept-erasure."
        )
    if model is None:
        return
    training = model.training
    width = model.eval().features(next(task.sweep("train", 2, device=model.device)).x).shape[1]
    model.train(training)
    wanted = model.head.weight.shape[1]
    if width != wanted:
        raise HoldfastError(
            f"{model.name}: the head takes {wanted} features and gets {width} numbers a sample, a map over positions. "
            "Linear extractors and spectra need pooling before the head."
        )
