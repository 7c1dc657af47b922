"""Finished models in a folder, each under the hash of everything that it depends on."""

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
"""Everything that a model depends on, by name; JSON can hold it, and its hash names the model's files."""

StoredModel = tuple[SplitModel, Mapping[str, Any]]
"""A model, and notes that JSON can hold."""


@dataclass(frozen=True)
class ModelStore:
    """Finished models in a folder, each named by the hash of its cache key."""

    folder: Path

    def _paths(self, cache_key: CacheKey) -> tuple[Path, Path]:
        name = fingerprint(cache_key)
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def has(self, cache_key: CacheKey) -> bool:
        """Whether a model is here; its notes are written last, so that it is whole."""
        return process_group().on_main_process(self._paths(cache_key)[1].is_file)

    def put(self, cache_key: CacheKey, model: SplitModel, notes: Mapping[str, Any]) -> None:
        """Keeps a model, with notes that JSON can hold."""
        process_group().on_main_process(lambda: self._put(cache_key, model, notes))

    def _put(self, cache_key: CacheKey, model: SplitModel, notes: Mapping[str, Any]) -> None:
        weights, beside = self._paths(cache_key)
        file_sha256 = model.save(weights)
        written = {"made_of": cache_key, "file_sha256": file_sha256, "holdfast": version("holdfast"), **notes}
        write_atomic(beside, json.dumps(written, indent=1))

    def get(self, cache_key: CacheKey, like: SplitModel) -> tuple[SplitModel, dict[str, Any]]:
        """Returns a model and its notes.

        Args:
            cache_key: everything that it depends on.
            like: of the same architecture; an extractor that was inserted later is found in the file.

        Raises:
            HoldfastError: if the files are damaged.
        """
        weights, notes = self._paths(cache_key)[0], self.notes(cache_key)
        model = like.clone()
        described = load_tensors(weights)[1].get("model")
        if isinstance(described, dict):
            model.expect_extractor(described.get("extractor", False))
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
                raise ValueError("it is about another model")
            if notes["file_sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest():
                raise ValueError(f"{weights.name} has another SHA-256 than it says")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise HoldfastError(
                f"{str(beside)!r} is damaged ({error}); delete it, and the model is made again."
            ) from error
        return dict(notes)

    def copy_from(self, cache_key: CacheKey, other: ModelStore, owner: Path) -> None:
        """Copies a model from another store, after checking it; the notes say whose it was.

        Args:
            cache_key: everything that it depends on.
            other: where it is.
            owner: the folder of the other run.
        """
        process_group().on_main_process(lambda: self._copy_from(cache_key, other, owner))

    def _copy_from(self, cache_key: CacheKey, other: ModelStore, owner: Path) -> None:
        notes = other.notes(cache_key)
        source, (weights, beside) = other._paths(cache_key)[0], self._paths(cache_key)
        write_atomic(weights, source.read_bytes())
        write_atomic(beside, json.dumps({**notes, "reused_from": notes.get("reused_from") or str(owner)}, indent=1))

    def cache_keys(self) -> list[CacheKey]:
        """Returns the cache key of each model.

        Raises:
            HoldfastError: if notes cannot be read; the model that is looked for may be the one that they describe.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                cache_key = read_json(path.read_bytes())["made_of"]
                if not isinstance(cache_key, dict):
                    raise ValueError("it lacks what the model depends on")
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                raise HoldfastError(
                    f"{str(path)!r} is damaged ({error}); delete it, and the model beside it, to go on without it."
                ) from error
            found.append(cache_key)
        return found


def model_store(folder: Path, kind: str) -> ModelStore:
    """Returns the store in a run's folder of models of one kind: `originals`, `immunized` or `classifiers`."""
    return ModelStore(folder / "checkpoints" / kind)


class ModelJobs:
    """A model store as the store of jobs, whose results are a model and its notes; see `holdfast.runtime.jobs.Store`.

    Args:
        store: where the models are.
        cache_keys: by key of a job: everything that its model depends on.
        like: a model of the same architecture by key.
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
