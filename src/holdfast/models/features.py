"""What a head receives: the features of a task's samples, in order, as a linear probe would train on them.

A battery's probes, a linear defense and a feasibility study ask for the same features again and again. The last ones
are kept, so that a network is run once over a task: see `FeatureCache`.
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
"""What the features that are kept may take in memory: 20 times CIFAR-10 before the head of a ResNet-20."""

Key = tuple[str, ...]
XY = tuple[Tensor, Tensor]


class FeatureCache:
    """Features and targets of the tasks last asked for, up to so many bytes; what was not used for longest goes first.

    Args:
        limit: bytes; what is larger than that alone is not kept.

    Attributes:
        hits: how often something was there.
        misses: how often it was not.

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
        """What is kept takes so many."""
        return sum(map(size_of, self._kept.values()))

    def get(self, key: Key) -> XY | None:
        """Returns what was put under a key, if it is still here; it is shared, so do not write into it."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found

    def put(self, key: Key, found: XY) -> None:
        """Keeps features and targets, and lets go of others where there is no room."""
        if size_of(found) > self.limit:
            return
        self._kept[key] = found
        self._kept.move_to_end(key)
        while self.bytes > self.limit:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Lets go of everything, and counts anew."""
        self._kept.clear()
        self.hits = self.misses = 0


KEPT = FeatureCache()
"""The one cache of this process."""


def size_of(found: XY) -> int:
    """Returns the bytes of features and targets."""
    return sum(t.numel() * t.element_size() for t in found)


@torch.no_grad()
def _key(model: SplitModel, task: Task) -> Key:
    """What features depend on beside the split.

    Weights alone do not say what a network computes, so a few samples are asked as well.
    """
    device, training = model.device, model.training
    sample = model.eval().features(next(task.sweep("train", 8, device=device)).x).flatten().tolist()
    model.train(training)
    data = task.facts()
    return model.facts().sha256, data.sha256, str(data.classes), str(device), fingerprint(sample)


@torch.no_grad()
def feature_batches(model: SplitModel | None, task: Task, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields features and least-squares targets of a split, a batch at a time, in evaluation mode.

    Those of a model are taken from the cache, or kept there when all have been asked for, if there is room.

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
            found = batch.x.flatten(1) if model is None else model.features(batch.x)
            place = place_of_float64(device)
            yield found.to(place).to(torch.float64), task.targets(batch.y.to(place))
    finally:
        if model is not None:
            model.train(training)


def features(model: SplitModel | None, task: Task, split: Split) -> tuple[Tensor, Tensor]:
    """Returns all features and targets of a split; see `feature_batches`. They may be kept: do not write into them."""
    if model is None:
        return _joined(list(_computed(model, task, split)))
    return _kept(model, task, split, _key(model, task))


def both_splits(model: SplitModel, task: Task) -> tuple[Tensor, Tensor]:
    """Returns the features of the training and of the test split, as `features` would, and asks for the key once."""
    key = _key(model, task)
    return _kept(model, task, "train", key)[0], _kept(model, task, "test", key)[0]


def _kept(model: SplitModel, task: Task, split: Split, key: Key) -> XY:
    found = KEPT.get((*key, split))
    if found is None:
        found = _joined(list(_computed(model, task, split)))
        KEPT.put((*key, split), found)
    return found


def feature_precision(model: SplitModel | None, task: Task) -> float:
    """Returns eps of the arithmetic that features are computed in: the network's, or the inputs' own."""
    dtype = model.dtype if model is not None else next(task.sweep("train", 1, device=CPU)).x.dtype
    return torch.finfo(dtype).eps


@torch.no_grad()
def check_feature_width(model: SplitModel | None, task: Task) -> None:
    """Refuses a head that gets a map rather than a vector, on which a linear extractor would mix places.

    Args:
        model: None: inputs are the features.
        task: the model's own.

    Raises:
        HoldfastError: if a sample's features are more numbers than the head takes, or the task has no features.
    """
    if task.no_features is not None:
        raise HoldfastError(
            f"Linear extractors and spectra need a vector of features a sample. Of {task.described} there is none: "
            f"{task.no_features}. SOPHON is the defense for denoisers."
        )
    if model is None:
        return
    device = model.device
    training = model.training
    found = model.eval().features(next(task.sweep("train", 2, device=device)).x).shape[1]
    model.train(training)
    wanted = model.head.weight.shape[1]
    if found != wanted:
        raise HoldfastError(
            f"{model.name}: the head takes {wanted} features and gets {found} numbers a sample, a map over places. "
            "Linear extractors and spectra need the pooling before the head."
        )
