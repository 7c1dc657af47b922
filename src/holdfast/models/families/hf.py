"""Models of Hugging Face's transformers: image classifiers, and language models that classify or predict tokens."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import wrappers
from holdfast.models.families import hf_causal, hf_text, hf_vision
from holdfast.models.families.hf_causal import EVERY_POSITION, CausalModel
from holdfast.models.family import Built, Family, Shape, check_known, config_in, for_channels, register
from holdfast.models.labels import names_in
from holdfast.models.spec import ModelSpec, find_weights
from holdfast.models.split_model import SplitModel
from holdfast.tasks import Task, located


@register("hf:NAME")
class HuggingFaceFamily(Family):
    """Models by a folder, a name on the Hub, or `package:NAME/FOLDER`."""

    def for_task(self, spec: ModelSpec, task: Task) -> ModelSpec:
        """See `Family.for_task`: text models get the task's vocabulary, unless saved weights have one."""
        if "num_labels" in spec.options and (spec.weights is not None or spec.options.get("config") is not None):
            raise HoldfastError(
                f"{spec.name}: num_labels replaces the model's own head by a fresh one, which is not possible with "
                "`weights` or `config`; leave it out."
            )
        if task.vocabulary is None or "vocabulary" in spec.options:
            return spec
        options = {**spec.options, "vocabulary": asdict(task.vocabulary)}
        if task.answers_with == CausalModel.answers_with:
            given = options.setdefault("pooling", EVERY_POSITION)
            if given != EVERY_POSITION:
                raise HoldfastError(
                    f"{spec.name}: pooling is {given}, and {task.described} needs an answer at every position; leave "
                    "it out."
                )
        return spec.model_copy(update={"options": options})

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`."""
        if "vocabulary" in spec.options:
            return _build_language(spec, num_outputs, data_dir)
        return _build_vision(spec, input_shape, data_dir)

    def released_options(self, name: str, task: Task, *, own_head: bool) -> dict[str, Any]:
        """See `Family.released_options`."""
        fresh = not own_head and task.answers_with == SplitModel.answers_with
        return {"num_labels": task.num_outputs} if fresh else {}

    def output_names(self, spec: ModelSpec, built: Built, network: nn.Module) -> tuple[str, ...] | None:
        """See `Family.output_names`."""
        fresh = spec.weights is None and spec.options.get("config") is not None
        return None if fresh else names_in(built.rebuild.options.get("config"))

    def name_of_folder(self, folder: Path) -> ModelSpec | None:
        """See `Family.name_of_folder`."""
        return ModelSpec(name=f"hf:{folder}") if "model_type" in config_in(folder) else None

    def save_pretrained(self, model: SplitModel, folder: Path) -> None:
        """Writes a folder for `from_pretrained` of transformers, with the tokenizer, or the preprocessor of images."""
        network: Any = model.network
        if isinstance(model, CausalModel):
            hf_causal.write(model, folder)
            return
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
                f"{model.name} has a head that transformers cannot read; write it with save(FILE), and read it with "
                "SplitModel.from_pretrained(FILE, task)."
            )


def _build_vision(spec: ModelSpec, input_shape: tuple[int, ...], data_dir: Path | str | None) -> Built:
    check_known(spec, ["config", "num_labels"])
    config = spec.options.get("config")
    if config is not None:
        return Built(hf_vision.architecture(spec.name.removeprefix("hf:"), config), spec, foreign=True)
    place = located(spec.name.removeprefix("hf:"), data_dir)
    notes: tuple[str, ...] = ()
    if spec.weights:
        network, config, notes = hf_vision.with_weights(place, find_weights(spec.weights, data_dir))
    else:
        network, config = hf_vision.pretrained(place, **spec.options)
    plain = wrappers.unwrapped(network, spec.name)  # merges adapters in the folder into the weights
    notes += plain.notes
    norm = hf_vision.normalisation(place)
    mean, std = for_channels(norm, input_shape) if norm is not None else (None, None)
    name = f"hf:{Path(place).name}" if Path(place).is_dir() else spec.name
    rebuild = spec.model_copy(
        update={"name": name, "options": {"config": config}, "mean": spec.mean or mean, "std": spec.std or std}
    )
    if norm is None and not spec.mean:
        notes += (
            f"{name} comes without a preprocessor configuration; it gets images in [0, 1] without normalisation.",
        )
    return Built(plain.network, rebuild, norm=(mean, std), foreign=True, loaded=True, notes=notes)


def _build_language(spec: ModelSpec, num_outputs: int, data_dir: Path | str | None) -> Built:
    name = spec.name.removeprefix("hf:")
    configured = spec.options.get("config") is not None
    place = name if configured else located(name, data_dir)
    causal = spec.options.get("pooling") == EVERY_POSITION
    built = hf_causal.build(spec, place) if causal else hf_text.build(spec, place, num_outputs)
    if configured:
        return built
    folder = Path(place).exists() and not name.startswith("package:")
    rebuild = built.rebuild.model_copy(update={"name": f"hf:{Path(place).name}"}) if folder else built.rebuild
    return replace(built, rebuild=rebuild, tokenizer=place)
