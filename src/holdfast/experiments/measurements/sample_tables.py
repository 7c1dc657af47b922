"""What is shown of samples: figures of pictures, the table of distances, and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from holdfast.experiments.measurements.sample_images import (
    CLASSIFIER_STEPS,
    LEAST,
    ModelSamples,
    PicturedModel,
    SampleContext,
    SettingImages,
    drawn_images,
    shown_images,
)
from holdfast.metrics.generation import Distance, kernel_distance, noised
from holdfast.results.image_grid import draw
from holdfast.results.tables import Cell, Figure, Outcome, Table
from holdfast.runtime.run import derive_seed
from holdfast.tasks.base import Split

ACROSS: Final = 8
"""Pictures in a line."""


def lay_out(context: SampleContext, samples_of: Mapping[PicturedModel, ModelSamples]) -> Outcome:
    """Returns figures, the table `generation`, and sentences.

    Args:
        context: of the samples.
        samples_of: what each model made.
    """
    figures: dict[str, Figure] = {}
    rows: list[dict[str, str | Cell]] = []
    findings, several = [], len(context.settings) > 1
    for i, name in enumerate(context.settings):
        if name not in context.images:
            continue
        mine = {s: found for s, found in samples_of.items() if s.setting == name}
        where = f"{name}: " if several else ""
        for key, figure in _figures(context, context.images[name], mine, where):
            figures[f"{key}_{i}" if several else key] = figure
        if context.images[name].classifier is not None:
            rows += [{"setting": name, **row} if several else row for row in _rows(context, name, mine)]
            findings += [where + finding for finding in _about_samples(mine)]
        elif context.spec.measured:
            findings.append(
                f"{where}No distance of samples from test images was taken: it needs labels of at least two classes on "
                f"the benign images, and {LEAST} test images of both tasks."
            )
    tables = {"generation": Table(title="Samples and test images", rows=rows, note=_note(context))} if rows else {}
    return Outcome(tables, figures, findings)


def _figures(
    context: SampleContext, images: SettingImages, samples_of: Mapping[PicturedModel, ModelSamples], where: str
) -> Iterator[tuple[str, Figure]]:
    spec, run = context.spec, context.run
    noise = derive_seed(run.seed, "pictures", "noise")
    for task_role, task in (("restricted", images.restricted), ("benign", images.benign)):
        mine = {
            s.model: made for s, (made, _) in samples_of.items() if (s.adversary is None) == (task_role == "benign")
        }
        if not mine:
            continue
        state = "as the models were released" if task_role == "benign" else "after the attack"
        real, levels = shown_images(task, spec, run), spec.levels(task.schedule.steps)
        for level in levels:
            share = task.schedule.alpha_bar[level].item()
            yield f"restored_{task_role}" + (f"_{level}" if len(levels) > 1 else ""), draw(
                f"{where}Noise taken away from {task.name}, {state}",
                {"test images": real, "with noise": noised(real, level, task.schedule, seed=noise)}
                | {model: made[f"restored {level}"] for model, made in mine.items()},
                note=f"Noise was added up to step {level} of {task.schedule.steps}, where {share:.0%} of an image's "
                f"variance is left. Each model took it away in {min(spec.ddim_steps, level + 1)} steps of DDIM.",
                across=ACROSS,
            )  # fmt: skip
        yield (
            f"samples_{task_role}",
            draw(
                f"{where}Samples, {state}: they should look like {task.name}",
                {"test images": drawn_images(task, "test", spec.samples, run)}
                | {model: made["samples"] for model, made in mine.items()},
                note=f"{spec.ddim_steps} steps of DDIM; every model began with the same noise.",
                across=ACROSS,
            ),
        )


def _rows(
    context: SampleContext, setting: str, samples_of: Mapping[PicturedModel, ModelSamples]
) -> list[dict[str, str | Cell]]:
    """The floor, then a row for each model."""
    images, count, run = context.images[setting], context.spec.measured, context.run
    found: dict[str, dict[str, Distance]] = {"training images": {}}
    for task_role, task in (("restricted", images.restricted), ("benign", images.benign)):
        train, test = (images.features(drawn_images(task, s, count, run)) for s in _SPLITS)
        if len(train) >= LEAST:
            found["training images"][task_role] = kernel_distance(train, test)
    for subject, (_, distance) in samples_of.items():
        if distance is not None:
            found.setdefault(subject.model, {})["benign" if subject.adversary is None else "restricted"] = distance
    return [{"model": model, **_cells(distances)} for model, distances in found.items()]


def _about_samples(samples_of: Mapping[PicturedModel, ModelSamples]) -> list[str]:
    """Whether released models still make pictures of their own task: a small error alone does not say so."""
    released = {s.model: (s.role, distance) for s, (_, distance) in samples_of.items() if s.adversary is None}
    original = next((distance for role, distance in released.values() if role == "original"), None)
    found = []
    for model, (role, distance) in released.items():
        if role != "immunized" or distance is None or original is None:
            continue
        noise = 2 * math.hypot(distance.error, original.error)
        if not math.isfinite(distance.value):
            found.append(f"Samples of {model} as released are not pictures: they are not finite.")
        elif distance.value - original.value > noise:
            times = f" ({distance.value / original.value:.3g} times as far)" if original.value > 0 else ""
            found.append(
                f"Samples of {model} as released are farther from benign test images than the original's{times}. "
                "Its error on noised images does not show that."
            )
        else:
            found.append(
                f"Samples of {model} as released are not farther from benign test images than the original's, within "
                "two standard errors."
            )
    return found


_SPLITS: Final[Sequence[Split]] = ("train", "test")


def _cells(distances: Mapping[str, Distance]) -> dict[str, str | Cell]:
    cells: dict[str, str | Cell] = {}
    for task_role in ("restricted", "benign"):
        distance = distances.get(task_role)
        for name, value in ((task_role, 0), (f"{task_role}_error", 1)):
            one = math.nan if distance is None else 1000 * distance[value]
            cells[name] = Cell.of([] if distance is None else [one if math.isfinite(one) else None])
    return cells


def _note(context: SampleContext) -> str:
    known = [f"{s.accuracy:.1%}" for s in context.images.values() if s.classifier is not None]
    return (
        "A thousand times the squared kernel distance, with the kernel of KID (Binkowski et al. 2018), between "
        f"{context.spec.measured} samples and as many test images, or all there are: of the restricted task after the "
        "attack, and of the benign task as released. Lower is better; behind each distance stands its standard error. "
        "This is neither FID nor KID: features are those of a small classifier that was trained here, for "
        f"{CLASSIFIER_STEPS} steps, on the labelled benign images (test accuracy {', '.join(known)}), and no network "
        "knows ImageNet; their mean square on training images is set to 1. Numbers compare within this table only. The "
        "row of training images is the floor: real images are that far from other real ones."
    )
