"""Pictures that the denoisers of a protocol make, and the distance of their samples from real images.

The SOPHON paper's Figure 5 shows noised images of the restricted task as restored by attacked models, and its Figure 6
noised images of the benign task as restored by released models. Holdfast adds samples and a distance: people fine-tune
a diffusion model for its pictures, not for a small error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from holdfast.auditing.trials import few_of
from holdfast.errors import HoldfastError
from holdfast.experiments.measurements.attack_curves import AttackContext
from holdfast.experiments.measurements.base import MEASUREMENTS, Measured, Measurement
from holdfast.experiments.measurements.sample_images import (
    LEAST,
    InceptionDistances,
    ModelSamples,
    PicturedModel,
    SampleContext,
    captions_of,
    drawn_images,
    drawn_rows,
    error_steps,
    inception_distances,
    labels_of,
    setting_images,
)
from holdfast.experiments.measurements.sample_tables import lay_out
from holdfast.experiments.setting import ORIGINAL, Setting, role_of
from holdfast.metrics.clip import clip_similarity, load_clip
from holdfast.metrics.generation import Distance, denoise, kernel_distance, sample, sample_captions
from holdfast.metrics.inception import load_inception
from holdfast.models import Denoiser, SplitModel, TextToImage
from holdfast.results.tables import Outcome, finite
from holdfast.runtime.distributed import process_group
from holdfast.runtime.executors import Executor
from holdfast.runtime.jobs import Job, run_jobs
from holdfast.runtime.run import Run, derive_seed, fingerprint
from holdfast.runtime.storage import load_tensors, save_tensors
from holdfast.tasks import DenoisingTask, TextToImageTask


@MEASUREMENTS.register("pictures")
class Samples(Measurement):
    """The pictures that a protocol makes of denoisers."""

    after_scores: ClassVar[bool] = True

    attack: str | None = Field(
        None, description="The attack before the pictures, by the name of its row; null: the first."
    )
    denoised: int = Field(8, ge=1, le=64, description="Test images to which noise is added and removed again.")
    noise_step: int | tuple[int, ...] | None = Field(
        None, description="How much noise: the step of the forward process, or several; null: a quarter of all steps."
    )
    samples: int = Field(16, ge=1, le=64, description="Samples of each model that are shown.")
    ddim_steps: int = Field(50, ge=1, description="DDIM steps of sampling and of removing noise.")
    guidance: float = Field(
        3.0, ge=0, description="Classifier-free guidance of text-to-image models; 1: none, in half of the time."
    )
    early: tuple[int, ...] = Field(
        (), description="Epochs of the attack after which samples are drawn, before its last one."
    )
    error_steps: int = Field(
        8, ge=0, le=100, description="Time steps at which the error on test images is measured; below 2: none."
    )
    clip: str | None = Field(
        None,
        description="A folder with a CLIP model of transformers, by which samples are compared with their captions; "
        "null: none.",
    )
    inception: str | None = Field(
        None,
        description="A file with the Inception weights of torch-fidelity, by which FID and KID of samples are given "
        "as well; null: neither.",
    )
    measured: int = Field(256, ge=0, description="Samples whose distance from test images is measured; 0: none.")

    def levels(self, steps: int) -> tuple[int, ...]:
        """Returns the steps of the forward process up to which noise is added, for a schedule of `steps` steps."""
        if self.noise_step is None:
            return (steps // 4,)
        return (self.noise_step,) if isinstance(self.noise_step, int) else self.noise_step

    def check(self, settings: Mapping[str, Setting]) -> None:
        """Refuses pictures that cannot be made, before anything is computed.

        Raises:
            HoldfastError: if there is no denoiser, or a number is outside the range of its noise schedule.
        """
        tasks = _denoising(settings)
        if not tasks:
            raise HoldfastError("pictures are made of denoisers, and no setting has one; leave the section out.")
        if self.clip is not None:
            if not any(isinstance(task, TextToImageTask) for task, _ in tasks.values()):
                raise HoldfastError("pictures: clip compares samples with their captions, and no setting has any.")
            load_clip(self.clip)
        if self.inception is not None:
            if not self.measured:
                raise HoldfastError("pictures: inception measures samples, and measured is 0; leave one of them out.")
            load_inception(self.inception)
        if 0 < self.measured < LEAST:
            raise HoldfastError(
                f"pictures: measured is {self.measured}; expected at least {LEAST}, or 0 for no distance."
            )
        for name, (task, restricted) in tasks.items():
            steps, last = task.schedule.steps, task.schedule.restorable - 1
            wrong = [level for level in self.levels(steps) if not 0 <= level <= last]
            if wrong or not self.levels(steps):
                raise HoldfastError(
                    f"pictures: noise_step is {self.noise_step}; expected numbers from 0 to {last}, as setting "
                    f"{name!r} has {steps} steps."
                )
            model = settings[name].original
            assert isinstance(model, Denoiser)
            if not isinstance(model, TextToImage) and model.sample_shape != task.output_shape:
                raise HoldfastError(
                    f"pictures: {model.name} draws samples of shape {model.sample_shape}, and the images of setting "
                    f"{name!r} have {task.output_shape}; set their image_size and channels to the model's."
                )
            # Pictures of both tasks start from the same noise.
            model.check_schedule(restricted.schedule, restricted.name)
            if self.ddim_steps > steps:
                raise HoldfastError(f"pictures: ddim_steps is {self.ddim_steps}; setting {name!r} has {steps} steps.")

    def measure(self, protocol: Measured) -> Outcome:
        """Returns figures, the table `generation`, and a sentence for every setting without a distance."""
        return take_pictures(self, pictured_models(self, protocol), protocol.context, executor=protocol.executor)


def _denoising(settings: Mapping[str, Setting]) -> dict[str, tuple[DenoisingTask, DenoisingTask]]:
    """Benign and restricted task of the settings whose model is a denoiser."""
    return {
        name: (setting.benign, setting.restricted)
        for name, setting in settings.items()
        if isinstance(setting.benign, DenoisingTask) and isinstance(setting.restricted, DenoisingTask)
    }


def pictured_models(spec: Samples, protocol: Measured) -> dict[PicturedModel, SplitModel]:
    """Returns each model after the attack with seed 0, and each model but scratch as released."""
    attack = next((a for a in protocol.plan if spec.attack in (None, a.label)), None)
    models: dict[PicturedModel, SplitModel] = {}
    for row, trials in zip(protocol.rows, protocol.trials, strict=True):
        if attack is not None and attack.label in row.covers and trials:
            adversary, last = trials[0].attack.adversary, attack.epochs[-1]
            for epoch in (*sorted(e for e in set(spec.early) if e < last), last):
                subject = PicturedModel(
                    row.setting, row.model, role_of(row.model), adversary, epoch * row.steps, epoch < last
                )
                models[subject] = protocol.context.model(trials[0])
    for name, setting in protocol.context.settings.items():
        models[PicturedModel(name, ORIGINAL, "original")] = setting.original
    for (name, label, seed), immunized in protocol.context.models.items():
        if seed == 0:
            models[PicturedModel(name, label, "immunized")] = immunized
    return models


def take_pictures(
    spec: Samples, models: Mapping[PicturedModel, SplitModel], protocol: AttackContext, *, executor: Executor
) -> Outcome:
    """Makes pictures and measures distances; the results of each model are stored in the run's folder at once.

    Args:
        spec: settings of the measurement.
        models: by description, each model before the attack, in the order of the rows; only denoisers count.
        protocol: settings, shots and the run.
        executor: where attacks run and pictures are made; it does not change them.

    Returns:
        Figures, the table `generation`, and a sentence for every setting without a distance.
    """
    run = protocol.run
    assert run.folder is not None
    images = {name: setting_images(spec, *tasks, run) for name, tasks in _denoising(protocol.settings).items()}
    subjects = [subject for subject in models if subject.setting in images]
    by_name = {(s.setting, s.model): models[s] for s in subjects}
    context = SampleContext(spec, protocol.settings, images, by_name, protocol.shots, run)
    jobs = [Job(fingerprint(context.cache_key(s)), s, str(s)) for s in subjects]
    pictures = {job.key: context.pictures(job.inputs) for job in jobs}
    store = _SampleStore(run.folder / "checkpoints" / "pictures", pictures)
    made = run_jobs(_make, context, jobs, store, run=run, executor=executor, description="Making pictures")
    return lay_out(context, dict(zip(subjects, made, strict=True)))


@dataclass(frozen=True)
class _SampleStore:
    """Stores the pictures of a model in a file that their hash names; see `holdfast.runtime.jobs.Store`."""

    folder: Path
    pictures: Mapping[str, Mapping[str, int]]  # by key, the number of pictures of each kind

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def missing(self, keys: Sequence[str]) -> list[str]:
        return process_group().on_main_process(lambda: [key for key in keys if not self._file(key).is_file()])

    def put(self, key: str, value: ModelSamples) -> None:
        distance = value.distance
        meta = {
            "distance": distance and [*map(str, distance)],
            "errors": list(value.errors),
            "recognised": value.recognised,
            "similarity": value.similarity,
            "inception": value.inception and [*map(str, value.inception)],
        }
        process_group().on_main_process(lambda: save_tensors(self._file(key), value.pictures, meta))

    def get(self, key: str) -> ModelSamples:
        file = self._file(key)
        tensors, meta = load_tensors(file)
        try:
            counts = {name: len(each) for name, each in tensors.items()}
            if counts != self.pictures[key]:
                raise ValueError(f"it holds pictures {counts} instead of {dict(self.pictures[key])}")
            distance = None if meta["distance"] is None else Distance(*map(float, meta["distance"]))
            errors = tuple(None if value is None else float(value) for value in meta["errors"])
            recognised, similarity = (
                None if meta[key] is None else float(meta[key]) for key in ("recognised", "similarity")
            )
            inception = None if meta["inception"] is None else InceptionDistances(*map(float, meta["inception"]))
        except (KeyError, TypeError, ValueError) as error:
            raise HoldfastError(f"{str(file)!r} is damaged ({error}); delete it, and it is made again.") from error
        return ModelSamples(tensors, distance, errors, recognised, similarity, inception)


def _make(context: SampleContext, subject: PicturedModel) -> ModelSamples:
    spec, run, setting = context.spec, context.run, context.settings[subject.setting]
    model = context.models[subject.setting, subject.model]
    if subject.adversary is None:
        model = model.clone().to(run.device)
    else:
        attacked: list[SplitModel] = []
        subject.adversary.attack(
            model, few_of(setting.adversary_data, context.shots, run, 0), budgets=[subject.steps], run=run,
            role=subject.role, seed=0, benign=setting.benign, keep=attacked.append,
        )  # fmt: skip
        model = attacked[0]
    assert isinstance(model, Denoiser)
    images = context.images[subject.setting]
    task = images.task(subject)
    wanted = images.classifier is not None or spec.inception is not None
    measured = spec.measured if wanted and not subject.early else 0
    with run.seeded("pictures"):
        made = {} if subject.early else _restored(model, task, spec, run)
        samples = _samples(model, task, max(spec.samples, measured), spec, run)
    made["samples"] = samples[: spec.samples]
    levels = () if subject.early else error_steps(task, spec)
    errors = tuple(finite(task.with_timesteps([t]).score(model)) for t in levels)
    similarity = None if subject.early else _similarity(samples, task, spec, run)
    if not measured:
        return ModelSamples(made, None, errors, None, similarity)
    kept, real = samples[:measured], drawn_images(task, "test", measured, run)
    inception = inception_distances(spec.inception, kept, real, run)
    if images.classifier is None:
        return ModelSamples(made, None, errors, None, similarity, inception)
    distance = kernel_distance(images.features(kept), images.features(real))
    recognised = images.recognised(kept, subject, run)
    return ModelSamples(made, distance, errors, recognised, similarity, inception)


def _similarity(samples: Tensor, task: DenoisingTask, spec: Samples, run: Run) -> float | None:
    """How well samples fit their captions by the given CLIP model, on average; None: there is none, or no number."""
    if spec.clip is None or not isinstance(task, TextToImageTask):
        return None
    captions = [task.captions[label] for label in labels_of(task, len(samples), run).tolist()]
    return finite(float(clip_similarity(spec.clip, samples, captions).mean()))


def _restored(model: Denoiser, task: DenoisingTask, spec: Samples, run: Run) -> dict[str, Tensor]:
    """Test images after noise was added and removed again, by the level of the noise."""
    rows = drawn_rows(task, "test", spec.denoised, run, "shown")
    captions = captions_of(task, len(rows), run, "shown")
    settings = {"seed": derive_seed(run.seed, "pictures", "noise"), "steps": spec.ddim_steps}
    return {
        f"restored {level}": task.pixels(
            denoise(model, task.images("test")[rows], level, captions=captions and captions[0], **settings)
        )
        for level in spec.levels(task.schedule.steps)
    }


def _samples(model: Denoiser, task: DenoisingTask, count: int, spec: Samples, run: Run) -> Tensor:
    """Pictures of a model; those of a text-to-image model are of the captions of test images."""
    seed, captions = derive_seed(run.seed, "pictures", "samples"), captions_of(task, count, run)
    if captions is None:
        return sample(model, count, seed=seed, steps=spec.ddim_steps)
    assert isinstance(model, TextToImage)
    drawn = sample_captions(
        model, *captions, seed=seed, steps=spec.ddim_steps, guidance=spec.guidance, shape=task.output_shape
    )
    return task.pixels(drawn)
