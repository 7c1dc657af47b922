"""Finished models in a folder, each under the hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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

MadeOf = dict[str, Any]


@dataclass(frozen=True)
class ModelStore:
    """Finished models of one kind in a folder, each named by the hash of what it is made of."""

    folder: Path

    def _paths(self, made_of: MadeOf) -> tuple[Path, Path]:
        name = fingerprint(made_of)
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def has(self, made_of: MadeOf) -> bool:
        """Whether a model made of this is here; the notes are written last, so that it is whole."""
        return process_group().on_main_process(self._paths(made_of)[1].is_file)

    def keep(self, made_of: MadeOf, model: SplitModel, notes: Mapping[str, Any]) -> None:
        """Puts a model here, with notes that JSON can hold."""
        process_group().on_main_process(lambda: self._keep(made_of, model, notes))

    def _keep(self, made_of: MadeOf, model: SplitModel, notes: Mapping[str, Any]) -> None:
        weights, beside = self._paths(made_of)
        file_sha256 = model.save(weights)
        written = {"made_of": made_of, "file_sha256": file_sha256, "holdfast": version("holdfast"), **notes}
        write_atomic(beside, json.dumps(written, indent=1))

    def take(self, made_of: MadeOf, like: SplitModel) -> tuple[SplitModel, dict[str, Any]]:
        """Returns a model that is here, and its notes.

        Args:
            made_of: what it is made of.
            like: of the same architecture; an extractor that was inserted later is found in the file.

        Raises:
            HoldfastError: if weights and notes are not what was put here.
        """
        weights, notes = self._paths(made_of)[0], self.notes(made_of)
        model = like.clone()
        described = load_tensors(weights)[1].get("model")
        if isinstance(described, dict):
            model.expect_extractor(described.get("extractor", False))
        model.load(weights)
        return model.eval(), notes

    def notes(self, made_of: MadeOf) -> dict[str, Any]:
        """Returns the notes on a model that is here, after checking that the weights are those that they are about.

        Raises:
            HoldfastError: if they are not, or something cannot be read.
        """
        weights, beside = self._paths(made_of)
        try:
            notes = read_json(beside.read_bytes())
            if notes["made_of"] != json.loads(json.dumps(made_of)):
                raise ValueError("it is about a model that is made of something else")
            if notes["file_sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest():
                raise ValueError(f"{weights.name} has another SHA-256 than it says")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise HoldfastError(
                f"{str(beside)!r} is damaged ({error}); delete it, and the model is made anew."
            ) from error
        return dict(notes)

    def borrow(self, made_of: MadeOf, other: ModelStore, owner: Path) -> None:
        """Copies a model from another shelf, after checking it; the notes say whose it was.

        Args:
            made_of: what it is made of.
            other: where it is.
            owner: the folder of the other run.
        """
        process_group().on_main_process(lambda: self._borrow(made_of, other, owner))

    def _borrow(self, made_of: MadeOf, other: ModelStore, owner: Path) -> None:
        notes = other.notes(made_of)
        source, (weights, beside) = other._paths(made_of)[0], self._paths(made_of)
        write_atomic(weights, source.read_bytes())
        write_atomic(beside, json.dumps({**notes, "reused_from": notes.get("reused_from") or str(owner)}, indent=1))

    def catalogue(self) -> list[MadeOf]:
        """Returns what each model here is made of.

        Raises:
            HoldfastError: if notes cannot be read: the model that is looked for may be theirs.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                made_of = read_json(path.read_bytes())["made_of"]
                if not isinstance(made_of, dict):
                    raise ValueError("it does not say what the model is made of")
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                raise HoldfastError(
                    f"{str(path)!r} is damaged ({error}); delete it, and the model beside it, to go on without it."
                ) from error
            found.append(made_of)
        return found


def shelf(folder: Path, kind: str) -> ModelStore:
    """Returns the shelf of a run's folder: `originals` or `immunized`."""
    return ModelStore(folder / "checkpoints" / kind)
