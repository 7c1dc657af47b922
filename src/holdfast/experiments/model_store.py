"""Finished models in a folder, each named by the hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.runtime.distributed import process_group
from holdfast.runtime.documents import read_json
from holdfast.runtime.run import fingerprint
from holdfast.runtime.storage import load_tensors, write_atomic

CacheKey = dict[str, Any]
"""Everything that a model depends on, by name; JSON-able. Its hash names the model's files."""

StoredModel = tuple[SplitModel, Mapping[str, Any]]
"""A model, and JSON-able notes."""


@dataclass(frozen=True)
class ModelStore:
    """Finished models in a folder, each named by the hash of its cache key."""

    folder: Path

    def _paths(self, cache_key: CacheKey) -> tuple[Path, Path]:
        name = fingerprint(cache_key)
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def has(self, cache_key: CacheKey) -> bool:
        """Whether the store holds a model. Notes are written last, so where they exist the model is complete."""
        return process_group().on_main_process(self._paths(cache_key)[1].is_file)

    def put(self, cache_key: CacheKey, model: SplitModel, notes: Mapping[str, Any]) -> None:
        """Stores a model with JSON-able notes."""

        def write() -> None:
            weights, beside = self._paths(cache_key)
            made_of = {"made_of": cache_key, "file_sha256": model.save(weights), "holdfast": version("holdfast")}
            write_atomic(beside, json.dumps({**made_of, **notes}, indent=1))

        process_group().on_main_process(write)

    def get(self, cache_key: CacheKey, like: SplitModel) -> tuple[SplitModel, dict[str, Any]]:
        """Returns a model and its notes.

        Args:
            cache_key: everything that it depends on.
            like: a model of the same architecture; the file says whether an extractor was added to it.

        Raises:
            HoldfastError: if the files are damaged.
        """
        weights, notes = self._paths(cache_key)[0], self.notes(cache_key)
        model = like.clone()
        description = load_tensors(weights)[1].get("model")
        if isinstance(description, dict):
            model.expect_extractor(description.get("extractor", False))
        model.load(weights)
        return model.eval(), notes

    def notes(self, cache_key: CacheKey) -> dict[str, Any]:
        """Returns the notes on a model, after checking that they belong to the weights.

        Raises:
            HoldfastError: if they do not, or a file cannot be read.
        """
        weights, beside = self._paths(cache_key)
        try:
            notes = read_json(beside.read_bytes())
            if notes["made_of"] != json.loads(json.dumps(cache_key)):
                raise ValueError("it describes another model")
            if notes["file_sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest():
                raise ValueError(f"{weights.name} has another SHA-256 than recorded")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise HoldfastError(
                f"{str(beside)!r} is damaged ({error}); delete it, and the model is made again."
            ) from error
        return dict(notes)

    def copy_from(self, cache_key: CacheKey, other: ModelStore, owner: Path) -> None:
        """Copies a model from another store, after checking it, and adds `owner` to its notes.

        Args:
            cache_key: everything that it depends on.
            other: the store that holds it.
            owner: the folder of the run that made it.
        """

        def copy() -> None:
            notes, (weights, beside) = other.notes(cache_key), self._paths(cache_key)
            write_atomic(weights, other._paths(cache_key)[0].read_bytes())
            write_atomic(beside, json.dumps({**notes, "reused_from": notes.get("reused_from") or str(owner)}, indent=1))

        process_group().on_main_process(copy)

    def cache_keys(self) -> list[CacheKey]:
        """Returns the cache key of each model.

        Raises:
            HoldfastError: if notes cannot be read, since they may describe the model that is needed.
        """
        cache_keys = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                cache_key = read_json(path.read_bytes())["made_of"]
                if not isinstance(cache_key, dict):
                    raise ValueError("it does not say what the model depends on")
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                raise HoldfastError(
                    f"{str(path)!r} is damaged ({error}); delete it, and the model beside it, to go on without it."
                ) from error
            cache_keys.append(cache_key)
        return cache_keys


def model_store(folder: Path, kind: str) -> ModelStore:
    """Returns a run folder's store of `originals`, `immunized` models or `classifiers`."""
    return ModelStore(folder / "checkpoints" / kind)


class ModelJobs:
    """Stores the models and notes that jobs return; see `holdfast.runtime.jobs.Store`.

    Args:
        store: holds the models.
        cache_keys: everything that a model depends on, by key of its job.
        like: a model of the same architecture, by key.
    """

    def __init__(self, store: ModelStore, cache_keys: Mapping[str, CacheKey], like: Mapping[str, SplitModel]) -> None:
        self.store, self.cache_keys, self.like = store, cache_keys, like

    def missing(self, keys: Sequence[str]) -> list[str]:
        """See `Store.missing`."""
        return [key for key in keys if not self.store.has(self.cache_keys[key])]

    def put(self, key: str, value: StoredModel) -> None:
        """See `Store.put`."""
        self.store.put(self.cache_keys[key], *value)

    def get(self, key: str) -> StoredModel:
        """See `Store.get`."""
        return self.store.get(self.cache_keys[key], self.like[key])
