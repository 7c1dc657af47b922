"""Tasks of texts and captions get their model's own tokenizer, and images the autoencoder of its pipeline."""

from __future__ import annotations

from pathlib import Path

from holdfast.models.sampled_text import sampled_task
from holdfast.models.spec import ModelSpec, spec_of
from holdfast.tasks import Task, TaskSpec, is_text, load_task, located, parse_spec
from holdfast.tasks.pipeline_folder import is_pipeline, parts_called, pipeline_index


def read_by(
    task: str | TaskSpec, model: str | ModelSpec | None, *, data_dir: Path | str | None = None
) -> str | TaskSpec:
    """Returns a task with its model's own tokenizer, if it is text or captions and names no tokenizer.

    Captioned images also get the noise schedule and the autoencoder of the model's pipeline, if they name no others.

    Args:
        task: as `load_task` takes it.
        model: as `load_model` takes it; a model without a tokenizer leaves the task as it is.
        data_dir: see `load_model`.

    Example:
        >>> read_by("phrases-mood", "hf:package:my_encoder/model").tokenizer
        'package:my_encoder/model'
        >>> read_by("digits", "hf:some/vision-model")
        'digits'
    """
    spec = parse_spec(task) if isinstance(task, str) else task
    if model is None:
        return task
    if spec.kind == "text-to-image":
        read = _captioned_for(spec, model, data_dir)
        return task if read == spec else read
    if spec.tokenizer is not None or not is_text(spec, data_dir=data_dir):
        return task
    described = model if isinstance(model, ModelSpec) else spec_of(model, data_dir)
    saved = described.options.get("vocabulary")  # that saved weights were trained on
    own = str(saved.get("name")) if isinstance(saved, dict) and "config" in described.options else None
    tokenizer = own or (described.name.removeprefix("hf:") if described.name.startswith("hf:") else None)
    return task if tokenizer is None else spec.model_copy(update={"tokenizer": tokenizer})


def _captioned_for(spec: TaskSpec, model: str | ModelSpec, data_dir: Path | str | None) -> TaskSpec:
    """A task of captions with what the model reads; small models may have no tokenizer but `words`."""
    described = model if isinstance(model, ModelSpec) else spec_of(model, data_dir)
    own: dict[str, object] = {}
    encoder = described.options.get("text_encoder")
    if encoder is not None:
        own["tokenizer"] = str(encoder).removeprefix("hf:")
    given = described.options.get("pipeline", described.name.removeprefix("diffusers:"))
    folder = Path(located(str(given), data_dir)).expanduser()
    if is_pipeline(folder) and parts_called("tokenizer", pipeline_index(folder)):
        own |= {"tokenizer": str(folder), "schedule": str(folder)}
        if parts_called("vae", pipeline_index(folder)):
            own["autoencoder"] = str(folder)
    return spec.model_copy(update={key: value for key, value in own.items() if getattr(spec, key) is None})


def load_task_for(task: str | TaskSpec, model: str | ModelSpec | None, *, data_dir: Path | str | None = None) -> Task:
    """Loads a task with its model's tokenizer: see `read_by` and `load_task`."""
    read = read_by(task, model, data_dir=data_dir)
    if isinstance(read, TaskSpec) and read.sampled is not None:
        return sampled_task(read, data_dir)
    return load_task(read, data_dir=data_dir)
