"""Figures of sample pictures, the table of distances, and findings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from holdfast.experiments.measurements.sample_images import (
    CLASSIFIER_STEPS,
    LEAST,
    SPLITS,
    InceptionDistances,
    ModelSamples,
    PicturedModel,
    SampleContext,
    SettingImages,
    drawn_images,
    error_steps,
    inception_distances,
    shown_images,
)
from holdfast.metrics.generation import Distance, kernel_distance, noised
from holdfast.results.image_grid import draw
from holdfast.results.tables import Cell, Figure, Lines, Outcome, Table, finite
from holdfast.runtime.run import derive_seed
from holdfast.tasks import DenoisingTask, TextToImageTask

if TYPE_CHECKING:
    from holdfast.experiments.measurements.samples import Samples

ACROSS: Final = 8
"""Pictures in a line."""

RUINED: Final = 2.0
"""Samples that are this many times as far from real images as the original's, beyond the noise, are of no use."""


def lay_out(context: SampleContext, samples_of: Mapping[PicturedModel, ModelSamples]) -> Outcome:
    """Returns figures, the table `generation`, and sentences.

    Args:
        context: context of the samples.
        samples_of: pictures and distance of each model.
    """
    figures: dict[str, Figure] = {}
    rows: list[dict[str, str | Cell]] = []
    findings, several = [], len(context.settings) > 1
    for i, name in enumerate(context.settings):
        if name not in context.images:
            continue
        own = {subject: made for subject, made in samples_of.items() if subject.setting == name}
        prefix = f"{name}: " if several else ""
        for key, figure in _figures(context, context.images[name], own, prefix):
            figures[f"{key}_{i}" if several else key] = figure
        rows += [{"setting": name, **row} if several else row for row in _rows(context, name, own)]
        findings += [prefix + finding for finding in (*_about_captions(own), *_about_samples(own))]
        if context.images[name].classifier is None and context.spec.measured:
            findings.append(
                f"{prefix}The distance of samples from test images was not measured by a classifier's features: it "
                f"needs labels of at least two classes on the benign images, and {LEAST} test images of both tasks."
            )
    tables = {"generation": Table(title="Samples and test images", rows=rows, note=_note(context))} if rows else {}
    return Outcome(tables, figures, findings)


def _figures(
    context: SampleContext, images: SettingImages, samples_of: Mapping[PicturedModel, ModelSamples], prefix: str
) -> Iterator[tuple[str, Figure]]:
    spec, run = context.spec, context.run
    noise = derive_seed(run.seed, "pictures", "noise")
    for task_role, task in (("restricted", images.restricted), ("benign", images.benign)):
        released = task_role == "benign"
        shown = {s: made for s, made in samples_of.items() if (s.adversary is None) == released}
        if not shown:
            continue
        own, several = {s.model: made for s, made in shown.items() if not s.early}, any(s.early for s in shown)
        state = "from the models as released" if released else "after the attack"
        real, noisy = shown_images(task, spec, run), spec.levels(task.schedule.steps)
        for level in noisy:
            share = task.schedule.alpha_bar[level].item()
            yield f"restored_{task_role}" + (f"_{level}" if len(noisy) > 1 else ""), draw(
                f"{prefix}Noise removed from {task.name}, {state}",
                {"test images": real, "with noise": noised(real, level, task.schedule, seed=noise)}
                | {model: made.pictures[f"restored {level}"] for model, made in own.items()},
                note=f"Noise was added up to step {level} of {task.schedule.steps}, where {share:.0%} of an image's "
                f"variance is left. Each model removed it in {min(spec.ddim_steps, level + 1)} steps of DDIM.",
                across=ACROSS,
            )  # fmt: skip
        if levels := error_steps(task, spec):
            yield (
                f"errors_{task_role}",
                _errors(f"{prefix}Error by noise level on {task.name}, {state}", task, levels, own),
            )
        yield (
            f"samples_{task_role}",
            draw(
                f"{prefix}Samples, {state}: they should look like {task.name}",
                {"test images": drawn_images(task, "test", spec.samples, run)}
                | {s.label(several): made.pictures["samples"] for s, made in shown.items()},
                note=f"{spec.ddim_steps} steps of DDIM; all models started from the same noise.{_prompts(task, spec)}",
                across=ACROSS,
            ),
        )


def _errors(title: str, task: DenoisingTask, levels: tuple[int, ...], samples_of: Mapping[str, ModelSamples]) -> Lines:
    """Errors as multiples of a linear denoiser's, which is at 1 at every level of noise."""
    linear = [task.with_timesteps([t]).chance for t in levels]
    return Lines(
        title=title,
        x_title="time step",
        y_title="error, linear denoiser = 1",
        log_y=True,
        x=[float(t) for t in levels],
        series={
            model: [None if e is None else e / base for e, base in zip(made.errors, linear, strict=True)]
            for model, made in samples_of.items()
        },
    )


def _prompts(task: DenoisingTask, spec: Samples) -> str:
    """How samples of captions were drawn."""
    if not isinstance(task, TextToImageTask):
        return ""
    return f" Each has the caption of the test image in its place; classifier-free guidance is {spec.guidance:g}."


def _rows(
    context: SampleContext, setting: str, samples_of: Mapping[PicturedModel, ModelSamples]
) -> list[dict[str, str | Cell]]:
    """A row for training images, which is the floor, then one for each model; none if nothing was measured."""
    images, count, run = context.images[setting], context.spec.measured, context.run
    asked, clip = isinstance(images.benign, TextToImageTask), context.spec.clip is not None
    place = context.spec.inception
    rows: dict[str, dict[str, Distance]] = {}
    inception: dict[str, dict[str, InceptionDistances]] = {}
    if images.classifier is not None or place is not None:
        rows["training images"], inception["training images"] = {}, {}
        for task_role, task in (("restricted", images.restricted), ("benign", images.benign)):
            train, test = (drawn_images(task, s, count, run) for s in SPLITS)
            if len(train) >= LEAST and images.classifier is not None:
                rows["training images"][task_role] = kernel_distance(images.features(train), images.features(test))
            if len(train) >= LEAST and (floor := inception_distances(place, train, test, run)) is not None:
                inception["training images"][task_role] = floor
    for subject, made in samples_of.items():
        task_role = "benign" if subject.adversary is None else "restricted"
        if made.distance is not None:
            rows.setdefault(subject.model, {})[task_role] = made.distance
        elif (made.similarity is not None or made.inception is not None) and not subject.early:
            rows.setdefault(subject.model, {})
        if made.inception is not None:
            inception.setdefault(subject.model, {})[task_role] = made.inception
    return [
        {
            "model": model,
            **_cells(distances),
            **({} if place is None else _inception_cells(inception.get(model, {}))),
            **(_captioned(model, samples_of, clip) if asked else {}),
        }
        for model, distances in rows.items()
    ]


def _inception_cells(distances: Mapping[str, InceptionDistances]) -> dict[str, str | Cell]:
    """KID with its error, times a thousand, and FID."""
    cells: dict[str, str | Cell] = {}
    for task_role in ("restricted", "benign"):
        found = distances.get(task_role)
        values = (
            {} if found is None else {"kid": 1000 * found.kid, "kid_error": 1000 * found.kid_error, "fid": found.fid}
        )
        for name in ("kid", "kid_error", "fid"):
            cells[f"{task_role}_{name}"] = Cell.of([finite(values[name])] if values else [])
    return cells


def _captioned(model: str, samples_of: Mapping[PicturedModel, ModelSamples], clip: bool) -> dict[str, str | Cell]:
    """The share of samples that are taken for what their caption says, and their similarity to it, in hundredths."""
    own = {s.adversary is None: made for s, made in samples_of.items() if s.model == model and not s.early}
    cells: dict[str, str | Cell] = {}
    for role, released in (("restricted", False), ("benign", True)):
        made = own.get(released, ModelSamples({}))
        for name, share in (("recognised", made.recognised), *([("clip", made.similarity)] if clip else [])):
            cells[f"{role}_{name}"] = Cell.of([] if share is None else [100 * share])
    return cells


def _about_captions(samples_of: Mapping[PicturedModel, ModelSamples]) -> list[str]:
    """Says which models draw what their captions say, after the attack."""
    shares = {s.model: made.recognised for s, made in samples_of.items() if s.adversary is not None and not s.early}
    listed = ", ".join(f"{model} {share:.0%}" for model, share in shares.items() if share is not None)
    return (
        [f"After the attack, samples are recognised as what the restricted captions say: {listed}."] if listed else []
    )


def _about_samples(samples_of: Mapping[PicturedModel, ModelSamples]) -> list[str]:
    """Says whether released models still make pictures of their own task, which a small error does not show."""
    released = {s.model: (s.role, made.distance) for s, made in samples_of.items() if s.adversary is None}
    original = next((distance for role, distance in released.values() if role == "original"), None)
    sentences = []
    for model, (role, distance) in released.items():
        if role != "immunized" or distance is None or original is None:
            continue
        noise = 2 * math.hypot(distance.error, original.error)
        if not math.isfinite(distance.value):
            sentences.append(f"Samples of {model} as released are not pictures: they are not finite.")
        elif distance.value - original.value > noise:
            times = f" ({distance.value / original.value:.3g} times as far)" if original.value > 0 else ""
            ruined = "The model is ruined for drawing. " if distance.value > RUINED * max(original.value, 0.0) else ""
            sentences.append(
                f"Samples of {model} as released are farther from benign test images than the original's{times}. "
                f"{ruined}Its error on noised images does not show that."
            )
        else:
            sentences.append(
                f"Samples of {model} as released are not farther from benign test images than the original's, within "
                "two standard errors."
            )
    return sentences


def _cells(distances: Mapping[str, Distance]) -> dict[str, str | Cell]:
    cells: dict[str, str | Cell] = {}
    for task_role in ("restricted", "benign"):
        distance = distances.get(task_role)
        for i, name in enumerate((task_role, f"{task_role}_error")):
            cells[name] = Cell.of([] if distance is None else [finite(1000 * distance[i])])
    return cells


def _note(context: SampleContext) -> str:
    known = [f"{s.accuracy:.1%}" for s in context.images.values() if s.classifier is not None]
    sentences = [
        "A thousand times the squared kernel distance, with the kernel of KID (Binkowski et al. 2018), between "
        f"{context.spec.measured} samples and as many test images, or all there are: of the restricted task after the "
        "attack, and of the benign task as released. Lower is better; each distance is followed by its standard error. "
        "These distances are neither FID nor KID: the features are those of a small classifier, trained for "
        f"{CLASSIFIER_STEPS} steps on the labelled benign images (test accuracy {', '.join(known)}), not of a network "
        "trained on ImageNet; their mean square on training images is set to 1. Compare numbers in this table only. "
        "The row of training images is the floor: the distance of real images from other real images."
    ] * bool(known)
    if known and any(isinstance(s.benign, TextToImageTask) for s in context.images.values()):
        sentences.append(
            "For images with captions the classifier learned all captions of both tasks; *recognised* is the share of "
            "samples, in percent, that it takes for what their caption says."
        )
    if context.spec.inception is not None:
        sentences.append(
            f"*kid* (times a thousand, with its standard error) and *fid* are by the features of Inception, weights "
            f"{context.spec.inception}. FID of {context.spec.measured} samples is too large: compare it in this table "
            "only."
        )
    if context.spec.clip is not None:
        sentences.append(
            f"*clip* is a hundred times the cosine of samples and captions by the CLIP model {context.spec.clip}."
        )
    return " ".join(sentences)
