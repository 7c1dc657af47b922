"""What denoisers of a protocol make of images: pictures for people, and how far samples are from real images.

The SOPHON paper's Figure 5 shows noised images of the restricted task as attacked models restore them, its Figure 6
those of the benign task as released models do. Samples and a distance are added: who fine-tunes a diffusion model wants
pictures of it, not a small error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from holdfast.adversaries import Adversary
from holdfast.auditing.trials import few_of
from holdfast.errors import HoldfastError
from holdfast.experiments.model_store import shelf
from holdfast.experiments.setting import Setting
from holdfast.metrics.generation import Distance, kernel_distance, noised, restore, sample
from holdfast.models import Denoiser, SplitModel, load_model
from holdfast.results import Role
from holdfast.results.image_grid import draw
from holdfast.results.tables import Cell, Figure, Outcome, Table
from holdfast.runtime.distributed import alone, process_group
from holdfast.runtime.executors import Executor
from holdfast.runtime.run import Run, derive_seed, fingerprint
from holdfast.runtime.storage import load_tensors, save_tensors
from holdfast.tasks import ArrayTask, DenoisingTask
from holdfast.tasks.base import Split
from holdfast.training import pretrain

ACROSS: Final = 8
"""Pictures in a line."""

CLASSIFIER_STEPS: Final = 400
"""Training of the network whose features are compared."""

LEAST: Final = 3
"""Samples that a kernel distance needs."""


class PicturesSpec(BaseModel):
    """The pictures that a protocol makes of denoisers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attack: str | None = Field(None, description="After which attack, by the name of its row; null: the first.")
    denoised: int = Field(8, ge=1, le=64, description="Test images to which noise is added and taken away again.")
    noise_step: int | tuple[int, ...] | None = Field(
        None, description="How much noise: the step of the forward process, or several; null: a quarter of all steps."
    )
    samples: int = Field(16, ge=1, le=64, description="Samples that are shown of each model.")
    ddim_steps: int = Field(50, ge=1, description="Steps of sampling and of taking noise away.")
    measured: int = Field(256, ge=0, description="Samples whose distance from test images is taken; 0: none.")

    def levels(self, steps: int) -> tuple[int, ...]:
        """Returns the steps of the forward process to go to, of so many that there are."""
        if self.noise_step is None:
            return (steps // 4,)
        return (self.noise_step,) if isinstance(self.noise_step, int) else self.noise_step


@dataclass(frozen=True)
class PicturedModel:
    """One model that pictures are made of.

    Attributes:
        setting: on which ground.
        model: its row in the tables.
        role: whose part it plays in the attack.
        adversary: who fine-tunes it on the restricted task first; None: it is shown on its own task, as released.
        steps: of the attack.
    """

    setting: str
    model: str
    role: Role
    adversary: Adversary | None = None
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.model} {'as released' if self.adversary is None else 'after the attack'} in {self.setting!r}"


@dataclass(frozen=True)
class _SettingImages:
    """What is compared with on one ground: the tasks, and the network whose features are measured, if there is one.

    Attributes:
        benign: the model's own task.
        restricted: what it must not be fine-tuned to.
        classifier: the network, on the CPU.
        accuracy: its test accuracy.
        unit: root mean square of its features on training images; the kernel, which adds 1 to a product of features,
            means little if they are of any size.
    """

    benign: DenoisingTask
    restricted: DenoisingTask
    classifier: SplitModel | None = None
    accuracy: float = math.nan
    unit: float = 1.0

    def features(self, pictures: Tensor) -> Tensor:
        """What the classifier's head receives, in units of its size on training images."""
        assert self.classifier is not None
        return _features(self.classifier, pictures) / self.unit

    def task(self, sitting: PicturedModel) -> DenoisingTask:
        """The images that a model is to make."""
        return self.benign if sitting.adversary is None else self.restricted


@dataclass(frozen=True)
class _SampleContext:
    """What all sittings need; it travels once to each worker."""

    spec: PicturesSpec
    grounds: Mapping[str, Setting]
    scenery: Mapping[str, _SettingImages]
    models: Mapping[tuple[str, str], SplitModel]
    shots: int | None
    run: Run

    def pictures(self, sitting: PicturedModel) -> dict[str, int]:
        """How many pictures of each kind a sitting makes."""
        task = self.scenery[sitting.setting].task(sitting)
        shown = min(self.spec.denoised, task.size("test"))
        levels = self.spec.levels(task.schedule.steps)
        return {f"restored {level}": shown for level in levels} | {"samples": self.spec.samples}

    def made_of(self, sitting: PicturedModel) -> dict[str, object]:
        """Everything that the pictures of a sitting depend on."""
        scenery, ground = self.scenery[sitting.setting], self.grounds[sitting.setting]
        classifier = scenery.classifier
        return {
            "model": self.models[sitting.setting, sitting.model].facts().sha256,
            "attack": None if sitting.adversary is None else [sitting.adversary.config(), sitting.steps],
            "shots": self.shots,
            "seed": self.run.seed,
            "pictures": self.spec.model_dump(mode="json", exclude={"attack"}),
            "task": scenery.task(sitting).facts().sha256,
            "data": [ground.benign.facts().sha256, ground.adversary_data.facts().sha256],
            "classifier": None if classifier is None else classifier.facts().sha256,
        }


def check_pictures(spec: PicturesSpec, grounds: Mapping[str, Setting]) -> None:
    """Refuses pictures that cannot be made, before any work is done.

    Raises:
        HoldfastError: if there is no denoiser, or a number is out of the range of its noise schedule.
    """
    found = _denoising(grounds)
    if not found:
        raise HoldfastError("pictures are made of denoisers, and no setting has one; leave the section out.")
    if 0 < spec.measured < LEAST:
        raise HoldfastError(f"pictures: measured is {spec.measured}; expected at least {LEAST}, or 0 for no distance.")
    for name, (task, restricted) in found.items():
        steps, last = task.schedule.steps, task.schedule.restorable - 1
        wrong = [level for level in spec.levels(steps) if not 0 <= level <= last]
        if wrong or not spec.levels(steps):
            raise HoldfastError(
                f"pictures: noise_step is {spec.noise_step}; expected numbers from 0 to {last}, as setting "
                f"{name!r} has {steps} steps."
            )
        model = grounds[name].original
        assert isinstance(model, Denoiser)
        if model.sample_shape != task.output_shape:
            raise HoldfastError(
                f"pictures: {model.name} draws samples of shape {model.sample_shape}, and the images of setting "
                f"{name!r} have {task.output_shape}; set their image_size and channels to the model's."
            )
        model.check_schedule(restricted.schedule, restricted.name)  # pictures of both begin with the same noise
        if spec.ddim_steps > steps:
            raise HoldfastError(f"pictures: ddim_steps is {spec.ddim_steps}; setting {name!r} has {steps} steps.")


def _denoising(grounds: Mapping[str, Setting]) -> dict[str, tuple[DenoisingTask, DenoisingTask]]:
    """Benign and restricted task of the settings whose model is a denoiser."""
    return {
        name: (ground.benign, ground.restricted)
        for name, ground in grounds.items()
        if isinstance(ground.benign, DenoisingTask) and isinstance(ground.restricted, DenoisingTask)
    }


def take_pictures(
    spec: PicturesSpec,
    grounds: Mapping[str, Setting],
    models: Mapping[PicturedModel, SplitModel],
    *,
    shots: int | None,
    run: Run,
    executor: Executor,
) -> Outcome:
    """Makes pictures and measures distances; each finished sitting is kept in the run's folder at once.

    Args:
        spec: what is wanted.
        grounds: models and tasks by setting; only denoisers count.
        models: every sitting and the model that it begins with, in the order of the rows.
        shots: the adversary's images; None: its whole half.
        run: seed, device, folder.
        executor: where attacks are run and pictures made; it does not change them.

    Returns:
        Figures, the table `generation`, and a sentence for every setting without one.
    """
    assert run.folder is not None
    scenery = {name: _scenery(spec, *tasks, run) for name, tasks in _denoising(grounds).items()}
    sittings = [sitting for sitting in models if sitting.setting in scenery]
    by_name = {(s.setting, s.model): models[s] for s in sittings}
    studio = _SampleContext(spec, grounds, scenery, by_name, shots, run)
    files = {s: run.folder / "checkpoints" / "pictures" / f"{fingerprint(studio.made_of(s))}.safetensors"
             for s in sittings}  # fmt: skip
    missing = process_group().on_main_process(lambda: [s for s in sittings if not files[s].is_file()])
    with run.progress("Making pictures", len(sittings), len(sittings) - len(missing)) as bar:
        for index, (made, distance) in executor.run(_work, studio, missing):
            meta = {"distance": distance and [*map(str, distance)]}
            process_group().on_main_process(partial(save_tensors, files[missing[index]], made, meta))
            bar.tick(str(missing[index]))
    albums = {sitting: _kept(files[sitting], studio.pictures(sitting)) for sitting in sittings}
    return _outcome(studio, albums)


ModelSamples = tuple[dict[str, Tensor], Distance | None]
"""Pictures by what they are, and the distance of samples from test images."""


def _kept(file: Path, pictures: Mapping[str, int]) -> ModelSamples:
    """Reads an album back; another program, or a person, may have written to the file."""
    tensors, meta = load_tensors(file)
    try:
        found = {name: len(each) for name, each in tensors.items()}
        if found != pictures:
            raise ValueError(f"it holds pictures {found} instead of {dict(pictures)}")
        distance = None if meta["distance"] is None else Distance(*map(float, meta["distance"]))
    except (KeyError, TypeError, ValueError) as error:
        raise HoldfastError(f"{str(file)!r} is damaged ({error}); delete it, and it is made anew.") from error
    return tensors, distance


def _work(studio: _SampleContext, sitting: PicturedModel) -> ModelSamples:
    """Makes the pictures of one model."""
    spec, run, ground = studio.spec, studio.run, studio.grounds[sitting.setting]
    victim = studio.models[sitting.setting, sitting.model]
    if sitting.adversary is None:
        victim = victim.clone().to(run.device)
    else:
        held: list[SplitModel] = []
        sitting.adversary.attack(
            victim, few_of(ground.adversary_data, studio.shots, run, 0), budgets=[sitting.steps], run=run,
            role=sitting.role, seed=0, benign=ground.benign, keep=held.append,
        )  # fmt: skip
        victim = held[0]
    assert isinstance(victim, Denoiser)
    scenery = studio.scenery[sitting.setting]
    task = scenery.task(sitting)
    shown, noise = _shown(task, spec, run), derive_seed(run.seed, "pictures", "noise")
    drawn = max(spec.samples, spec.measured if scenery.classifier is not None else 0)
    with run.seeded("pictures"):
        made = {
            f"restored {level}": restore(victim, shown, level, seed=noise, steps=spec.ddim_steps)
            for level in spec.levels(task.schedule.steps)
        }
        samples = sample(victim, drawn, seed=derive_seed(run.seed, "pictures", "samples"), steps=spec.ddim_steps)
    made["samples"] = samples[: spec.samples]
    if scenery.classifier is None:
        return made, None
    real = _images(task, "test", spec.measured, run)
    return made, kernel_distance(scenery.features(samples[: spec.measured]), scenery.features(real))


def _images(task: DenoisingTask, split: Split, count: int, run: Run, use: str = "measured") -> Tensor:
    """So many images of a split, the same for every model."""
    order = torch.randperm(task.size(split), generator=run.generator("pictures", use, split))
    return (task.images(split)[order[:count]] + 1) / 2


def _shown(task: DenoisingTask, spec: PicturesSpec, run: Run) -> Tensor:
    return _images(task, "test", spec.denoised, run, "shown")


def _scenery(spec: PicturesSpec, benign: DenoisingTask, restricted: DenoisingTask, run: Run) -> _SettingImages:
    """Trains a small classifier on the labelled benign images, unless there is nothing to tell apart."""
    fewest = min(benign.size("test"), restricted.size("test"))
    if not spec.measured or benign.labels("train").bincount().count_nonzero() < 2 or fewest < LEAST:
        return _SettingImages(benign, restricted)
    labelled = ArrayTask(
        benign.name, _bytes(benign, "train"), benign.labels("train").numpy(),
        _bytes(benign, "test"), benign.labels("test").numpy(), benign.class_names,
    )  # fmt: skip
    with run.seeded("pictures", "classifier"):
        fresh = load_model("cnn", labelled)
    assert run.folder is not None
    own = shelf(run.folder, "classifiers")
    made_of = {
        "untrained model": fresh.facts().sha256,
        "data": labelled.facts().sha256,
        "steps": CLASSIFIER_STEPS,
        "seed": run.seed,
    }
    if not own.has(made_of):
        run.say("Training a classifier, whose features samples are compared by")
        with alone():  # it measures, and must not depend on how many processes there are
            trained = pretrain(fresh, labelled, steps=CLASSIFIER_STEPS, run=Run(run.seed, run.device))
        own.keep(made_of, trained.cpu(), {})
    classifier = own.take(made_of, fresh)[0]
    size = float(_features(classifier, _images(benign, "train", spec.measured, run)).square().mean().sqrt())
    return _SettingImages(benign, restricted, classifier, labelled.score(classifier), size or 1.0)


def _bytes(task: DenoisingTask, split: Split) -> npt.NDArray[Any]:
    images = ((task.images(split) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def _features(classifier: SplitModel, pictures: Tensor) -> Tensor:
    return torch.cat([classifier.eval().features(part) for part in torch.split(pictures, 256)])


def _outcome(studio: _SampleContext, albums: Mapping[PicturedModel, ModelSamples]) -> Outcome:
    figures: dict[str, Figure] = {}
    rows: list[dict[str, str | Cell]] = []
    findings, several = [], len(studio.grounds) > 1
    for i, name in enumerate(studio.grounds):
        if name not in studio.scenery:
            continue
        mine = {s: album for s, album in albums.items() if s.setting == name}
        where = f"{name}: " if several else ""
        for key, figure in _figures(studio, studio.scenery[name], mine, where):
            figures[f"{key}_{i}" if several else key] = figure
        if studio.scenery[name].classifier is not None:
            rows += [{"setting": name, **row} if several else row for row in _rows(studio, name, mine)]
            findings += [where + finding for finding in _about_samples(mine)]
        elif studio.spec.measured:
            findings.append(
                f"{where}No distance of samples from test images was taken: it needs labels of at least two classes on "
                f"the benign images, and {LEAST} test images of both tasks."
            )
    tables = {"generation": Table(title="Samples and test images", rows=rows, note=_note(studio))} if rows else {}
    return Outcome(tables, figures, findings)


def _figures(
    studio: _SampleContext, scenery: _SettingImages, albums: Mapping[PicturedModel, ModelSamples], where: str
) -> Iterator[tuple[str, Figure]]:
    spec, run = studio.spec, studio.run
    noise = derive_seed(run.seed, "pictures", "noise")
    for kind, task in (("restricted", scenery.restricted), ("benign", scenery.benign)):
        mine = {s.model: made for s, (made, _) in albums.items() if (s.adversary is None) == (kind == "benign")}
        if not mine:
            continue
        state = "as the models were released" if kind == "benign" else "after the attack"
        real, levels = _shown(task, spec, run), spec.levels(task.schedule.steps)
        for level in levels:
            share = task.schedule.alpha_bar[level].item()
            yield f"restored_{kind}" + (f"_{level}" if len(levels) > 1 else ""), draw(
                f"{where}Noise taken away from {task.name}, {state}",
                {"test images": real, "with noise": noised(real, level, task.schedule, seed=noise)}
                | {model: made[f"restored {level}"] for model, made in mine.items()},
                note=f"Noise was added up to step {level} of {task.schedule.steps}, where {share:.0%} of an image's "
                f"variance is left. Each model took it away in {min(spec.ddim_steps, level + 1)} steps of DDIM.",
                across=ACROSS,
            )  # fmt: skip
        yield (
            f"samples_{kind}",
            draw(
                f"{where}Samples, {state}: they should look like {task.name}",
                {"test images": _images(task, "test", spec.samples, run)}
                | {model: made["samples"] for model, made in mine.items()},
                note=f"{spec.ddim_steps} steps of DDIM; every model began with the same noise.",
                across=ACROSS,
            ),
        )


def _rows(
    studio: _SampleContext, setting: str, albums: Mapping[PicturedModel, ModelSamples]
) -> list[dict[str, str | Cell]]:
    """The floor, then a row for each model."""
    scenery, count, run = studio.scenery[setting], studio.spec.measured, studio.run
    found: dict[str, dict[str, Distance]] = {"training images": {}}
    for kind, task in (("restricted", scenery.restricted), ("benign", scenery.benign)):
        train, test = (scenery.features(_images(task, s, count, run)) for s in _SPLITS)
        if len(train) >= LEAST:
            found["training images"][kind] = kernel_distance(train, test)
    for sitting, (_, distance) in albums.items():
        if distance is not None:
            found.setdefault(sitting.model, {})["benign" if sitting.adversary is None else "restricted"] = distance
    return [{"model": model, **_cells(distances)} for model, distances in found.items()]


def _about_samples(albums: Mapping[PicturedModel, ModelSamples]) -> list[str]:
    """Whether released models still make pictures of their own task: a small error alone does not say so."""
    released = {s.model: (s.role, distance) for s, (_, distance) in albums.items() if s.adversary is None}
    original = next((distance for role, distance in released.values() if role == "original"), None)
    found = []
    for model, (role, distance) in released.items():
        if role != "immunized" or distance is None or original is None:
            continue
        noise = 2 * math.hypot(distance.error, original.error)
        if not math.isfinite(distance.value):
            found.append(f"Samples of {model} as released are no pictures: they are not finite.")
        elif distance.value - original.value > noise:
            times = f" ({distance.value / original.value:.3g} times as far)" if original.value > 0 else ""
            found.append(
                f"Samples of {model} as released are farther from benign test images than the original's{times}. "
                "Its error on noised images does not show that."
            )
        else:
            found.append(
                f"Samples of {model} as released are no farther from benign test images than the original's, within "
                "two standard errors."
            )
    return found


_SPLITS: Final[Sequence[Split]] = ("train", "test")


def _cells(distances: Mapping[str, Distance]) -> dict[str, str | Cell]:
    cells: dict[str, str | Cell] = {}
    for kind in ("restricted", "benign"):
        distance = distances.get(kind)
        for name, value in ((kind, 0), (f"{kind}_error", 1)):
            one = math.nan if distance is None else 1000 * distance[value]
            cells[name] = Cell.of([] if distance is None else [one if math.isfinite(one) else None])
    return cells


def _note(studio: _SampleContext) -> str:
    known = [f"{s.accuracy:.1%}" for s in studio.scenery.values() if s.classifier is not None]
    return (
        "A thousand times the squared kernel distance, with the kernel of KID (Binkowski et al. 2018), between "
        f"{studio.spec.measured} samples and as many test images, or all there are: of the restricted task after the "
        "attack, and of the benign task as released. Lower is better; behind each distance stands its standard error. "
        "This is neither FID nor KID: features are those of a small classifier that was trained here, for "
        f"{CLASSIFIER_STEPS} steps, on the labelled benign images (test accuracy {', '.join(known)}), and no network "
        "knows ImageNet; their mean square on training images is set to 1. Numbers compare within this table only. The "
        "row of training images is the floor: real images are that far from other real ones."
    )
