"""Models of Hugging Face's transformers: image classifiers, and language models that classify."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models import wrappers
from holdfast.models.families import hf_text, hf_vision
from holdfast.models.family import Built, Family, for_channels, register
from holdfast.models.labels import names_in
from holdfast.models.spec import ModelSpec, find_weights
from holdfast.tasks import Task, located

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from holdfast.models.split_model import SplitModel


@register("hf:NAME")
class HuggingFaceFamily(Family):
    """Models by a folder, a name on the Hub, or `package:NAME/FOLDER`."""

    def for_task(self, spec: ModelSpec, task: Task) -> ModelSpec:
        """See `Family.for_task`: of text, the model reads the task's ids, unless its weights say which it reads."""
        if "num_labels" in spec.options and (spec.weights is not None or spec.options.get("config") is not None):
            raise HoldfastError(
                f"{spec.name}: num_labels puts a fresh head in the place of the model's own, and there is none such "
                "with `weights` or `config`; leave it out."
            )
        read = task.vocabulary
        if read is None or "vocabulary" in spec.options:
            return spec
        return spec.model_copy(update={"options": {**spec.options, "vocabulary": asdict(read)}})

    def build(
        self, spec: ModelSpec, input_shape: tuple[int, ...], num_outputs: int, data_dir: Path | str | None
    ) -> Built:
        """See `Family.build`."""
        if "vocabulary" in spec.options:
            return _build_language(spec, num_outputs, data_dir)
        return _build_vision(spec, input_shape, data_dir)

    def released_options(self, name: str, task: Task, *, own_head: bool) -> dict[str, Any]:
        """See `Family.released_options`."""
        return {} if own_head else {"num_labels": task.num_outputs}

    def output_names(self, spec: ModelSpec, built: Built, network: nn.Module) -> tuple[str, ...] | None:
        """See `Family.output_names`."""
        fresh = spec.weights is None and spec.options.get("config") is not None
        return None if fresh else names_in(built.rebuild.options.get("config"))

    def name_of_folder(self, folder: Path) -> ModelSpec | None:
        """See `Family.name_of_folder`."""
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return ModelSpec(name=f"hf:{folder}") if isinstance(config, dict) and "model_type" in config else None

    def save_pretrained(self, model: SplitModel, folder: Path) -> None:
        """Writes what `from_pretrained` of transformers reads, with the tokenizer, or the preprocessor of images."""
        network: Any = model.network
        labels = dict((model.spec or {})["options"]["config"].get("id2label", {}))
        if len(labels) != model.num_outputs:  # of a head that was replaced
            labels = {str(i): f"LABEL_{i}" for i in range(model.num_outputs)}
        names = {int(i): str(name) for i, name in labels.items()}
        if isinstance(network, hf_text.Pooled | hf_text.Masked):
            hf_text.write_tokenizer(model, folder)
            hf_text.write(network, folder, names)
        elif hasattr(network, "save_pretrained"):
            hf_vision.write(network, folder, names)
            if model.mean is not None and model.std is not None:
                hf_vision.write_normalisation(model.mean, model.std, folder)
        else:
            raise HoldfastError(
                f"{model.name} got a head that transformers do not know; write it with save(FILE), and read it with "
                "SplitModel.from_pretrained(FILE, task)."
            )


def _build_vision(spec: ModelSpec, input_shape: tuple[int, ...], data_dir: Path | str | None) -> Built:
    unused = [o for o in spec.options if o not in ("config", "num_labels")]
    if unused:
        raise unknown(f"option of model {spec.name!r}:", unused[0], ["config", "num_labels"])
    config = spec.options.get("config")
    if config is not None:
        return Built(hf_vision.architecture(spec.name.removeprefix("hf:"), config), spec, foreign=True)
    place = located(spec.name.removeprefix("hf:"), data_dir)
    notes: tuple[str, ...] = ()
    if spec.weights:
        network, config, notes = hf_vision.with_weights(place, find_weights(spec.weights, data_dir))
    else:
        network, config = hf_vision.pretrained(place, **spec.options)
    found = wrappers.unwrapped(network, spec.name)  # adapters beside the model become a part of its weights
    network, merged = found.network, found.notes
    norm = hf_vision.normalisation(place)
    mean, std = for_channels(norm, input_shape) if norm is not None else (None, None)
    name = f"hf:{Path(place).name}" if Path(place).is_dir() else spec.name
    rebuild = spec.model_copy(
        update={"name": name, "options": {"config": config}, "mean": spec.mean or mean, "std": spec.std or std}
    )
    missing = f"{name} comes without a preprocessor configuration; images in [0, 1] are handed to it as they are."
    return Built(
        network,
        rebuild,
        norm=(mean, std),
        foreign=True,
        loaded=True,
        notes=(*notes, *merged) if norm is not None or spec.mean else (*notes, *merged, missing),
    )


def _build_language(spec: ModelSpec, num_outputs: int, data_dir: Path | str | None) -> Built:
    name = spec.name.removeprefix("hf:")
    configured = spec.options.get("config") is not None
    place = name if configured else located(name, data_dir)
    built = hf_text.build(name, place, spec.options, num_outputs)
    folder = not configured and Path(place).is_dir() and not name.startswith("package:")
    rebuild = spec.model_copy(
        update={"name": f"hf:{Path(place).name}" if folder else spec.name, "options": built.options}
    )
    return Built(
        built.network,
        rebuild,
        head="head" if isinstance(built.network, hf_text.Pooled) else None,
        foreign=True,
        vocabulary=built.vocabulary,
        tokenizer=None if configured else place,
        fresh_head=built.fresh_head and spec.weights is None,
        notes=built.notes,
    )
