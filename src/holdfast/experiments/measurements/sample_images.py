"""Inputs of sample pictures: the models, the real images, and the classifier whose features are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from holdfast.adversaries import Adversary
from holdfast.experiments.model_store import ModelJobs, StoredModel, model_store
from holdfast.experiments.setting import Setting
from holdfast.metrics.generation import Distance, kernel_distance
from holdfast.metrics.inception import frechet_inception_distance, inception_features
from holdfast.models import SplitModel, load_model
from holdfast.results import Role
from holdfast.runtime.distributed import alone
from holdfast.runtime.jobs import Job, run_jobs
from holdfast.runtime.run import Run, fingerprint
from holdfast.tasks import ArrayTask, DenoisingTask, TextToImageTask
from holdfast.tasks.base import Split
from holdfast.training import pretrain

if TYPE_CHECKING:
    from holdfast.experiments.measurements.samples import Samples

CLASSIFIER_STEPS: Final = 400
"""Training steps of the classifier whose features are compared."""

SPLITS: Final[Sequence[Split]] = ("train", "test")

LEAST: Final = 3
"""Samples that a kernel distance needs."""

PER_CAPTION: Final = 10
"""Training images a caption, on average, from which captions can be learned as classes."""


@dataclass(frozen=True)
class PicturedModel:
    """One model whose pictures are shown.

    Attributes:
        setting: name of the setting.
        model: its row in the tables.
        role: its role in the attack.
        adversary: fine-tunes it on the restricted task first; None: it is shown as released, on the benign task.
        steps: steps of the attack.
        early: whether the attack goes on after these steps; then only samples are drawn.
    """

    setting: str
    model: str
    role: Role
    adversary: Adversary | None = None
    steps: int = 0
    early: bool = False

    def __str__(self) -> str:
        return f"{self.model} {'as released' if self.adversary is None else 'after the attack'} in {self.setting!r}"

    def label(self, several: bool) -> str:
        """Returns the label of its row; with its steps, if there are several numbers of them."""
        if not several or self.adversary is None:
            return self.model
        return f"{self.model}, {self.steps} step{'s' * (self.steps != 1)}"


@dataclass(frozen=True)
class SettingImages:
    """The tasks of one setting, and the classifier whose features are compared.

    Attributes:
        benign: the model's own task.
        restricted: the task that it must not be fine-tuned to.
        classifier: of the benign images, and of the restricted ones if they have captions; on the CPU. None: no
            distance is measured.
        accuracy: its test accuracy.
        unit: root mean square of its features on training images. Features are divided by it, because the kernel adds
            1 to their product and so depends on their size.
    """

    benign: DenoisingTask
    restricted: DenoisingTask
    classifier: SplitModel | None = None
    accuracy: float = math.nan
    unit: float = 1.0

    def features(self, pictures: Tensor) -> Tensor:
        """Returns the inputs of the classifier's head, divided by `unit`."""
        assert self.classifier is not None
        return _features(self.classifier, pictures) / self.unit

    def task(self, subject: PicturedModel) -> DenoisingTask:
        """Returns the task whose images a model should make."""
        return self.benign if subject.adversary is None else self.restricted

    @torch.no_grad()
    def recognised(self, pictures: Tensor, subject: PicturedModel, run: Run) -> float | None:
        """Returns the share of samples of captions that the classifier takes for what their caption says.

        Args:
            pictures: one for each caption that the model was asked for, in their order.
            subject: the model.
            run: decides the captions.
        """
        task = self.task(subject)
        if self.classifier is None or not isinstance(task, TextToImageTask):
            return None
        first = 0 if subject.adversary is None else len(self.benign.class_names)
        wanted = first + labels_of(task, len(pictures), run)
        found = torch.cat([self.classifier(part).argmax(1) for part in torch.split(pictures, 256)])
        return float((found == wanted).double().mean())


@dataclass(frozen=True)
class SampleContext:
    """Input of all jobs; sent once to each worker."""

    spec: Samples
    settings: Mapping[str, Setting]
    images: Mapping[str, SettingImages]
    models: Mapping[tuple[str, str], SplitModel]
    shots: int | None
    run: Run

    def pictures(self, subject: PicturedModel) -> dict[str, int]:
        """Returns how many pictures of each kind a model makes."""
        task = self.images[subject.setting].task(subject)
        if subject.early:
            return {"samples": self.spec.samples}
        shown = min(self.spec.denoised, task.size("test"))
        levels = self.spec.levels(task.schedule.steps)
        return {f"restored {level}": shown for level in levels} | {"samples": self.spec.samples}

    def cache_key(self, subject: PicturedModel) -> dict[str, object]:
        """Returns everything that the pictures of a model depend on."""
        images, setting = self.images[subject.setting], self.settings[subject.setting]
        classifier = images.classifier
        return {
            "model": self.models[subject.setting, subject.model].facts().sha256,
            "attack": None if subject.adversary is None else [subject.adversary.config(), subject.steps],
            "shots": self.shots,
            "seed": self.run.seed,
            "pictures": self.spec.model_dump(mode="json", exclude={"attack"}),
            "task": images.task(subject).facts().sha256,
            "data": [setting.benign.facts().sha256, setting.adversary_data.facts().sha256],
            "classifier": None if classifier is None else classifier.facts().sha256,
        }


class InceptionDistances(NamedTuple):
    """Distances of samples from test images by Inception's features: KID with its standard error, and FID."""

    kid: float
    kid_error: float
    fid: float


def inception_distances(place: str | None, samples: Tensor, real: Tensor, run: Run) -> InceptionDistances | None:
    """Returns KID and FID of samples and real images; None if no Inception network is given, or there are too few.

    Args:
        place: the file with its weights, also searched for in `$HOLDFAST_DATA`; None: there is none.
        samples: shape (N, C, H, W), in [0, 1].
        real: shape (M, C, H, W), in [0, 1].
        run: where features are computed.
    """
    if place is None or min(len(samples), len(real)) < LEAST:
        return None
    made, wanted = (inception_features(place, pictures, run.device) for pictures in (samples, real))
    return InceptionDistances(*kernel_distance(made, wanted), frechet_inception_distance(made, wanted))


class ModelSamples(NamedTuple):
    """What is measured of one model.

    Attributes:
        pictures: by kind.
        distance: of samples from test images; None: not measured.
        recognised: see `SettingImages.recognised`.
        similarity: of samples and their captions, see `clip_similarity`; None: not measured.
        inception: see `inception_distances`; None: not measured.
        errors: at each of `error_steps`; None where it is not finite.
    """

    pictures: dict[str, Tensor]
    distance: Distance | None = None
    errors: tuple[float | None, ...] = ()
    recognised: float | None = None
    similarity: float | None = None
    inception: InceptionDistances | None = None


def error_steps(task: DenoisingTask, spec: Samples) -> tuple[int, ...]:
    """Returns the time steps at which the error is measured, from little noise to much; none if the task has its own.

    Example:
        >>> from holdfast.experiments.measurements.samples import Samples
        >>> from holdfast.tasks import load_task
        >>> error_steps(load_task("digits@kind=denoising"), Samples(error_steps=4))
        (0, 333, 666, 999)
    """
    if task.timesteps or spec.error_steps < 2:
        return ()
    last = task.schedule.restorable - 1  # beyond, noise is all that is there, and its error is 0
    return tuple(round(i * last / (spec.error_steps - 1)) for i in range(spec.error_steps))


def drawn_images(task: DenoisingTask, split: Split, count: int, run: Run, use: str = "measured") -> Tensor:
    """Returns `count` images of a split, the same for every model."""
    return task.pixels(task.images(split)[drawn_rows(task, split, count, run, use)])


def drawn_rows(task: DenoisingTask, split: Split, count: int, run: Run, use: str = "measured") -> Tensor:
    """Returns the numbers of these images."""
    return torch.randperm(task.size(split), generator=run.generator("pictures", use, split))[:count]


def labels_of(task: DenoisingTask, count: int, run: Run, use: str = "measured") -> Tensor:
    """Returns the labels of `count` test images; if there are more pictures than test images, they come again."""
    rows = drawn_rows(task, "test", count, run, use)
    return task.labels("test")[rows[torch.arange(count) % len(rows)]]


def captions_of(task: DenoisingTask, count: int, run: Run, use: str = "measured") -> tuple[Tensor, Tensor] | None:
    """Returns the token ids of the captions of `count` test images, and of the empty caption; None: it has none."""
    if not isinstance(task, TextToImageTask):
        return None
    return task.caption_ids(labels_of(task, count, run, use)), task.tokens[-1:]


def shown_images(task: DenoisingTask, spec: Samples, run: Run) -> Tensor:
    """Returns the test images to which noise is added, the same for every model."""
    return drawn_images(task, "test", spec.denoised, run, "shown")


def setting_images(spec: Samples, benign: DenoisingTask, restricted: DenoisingTask, run: Run) -> SettingImages:
    """Trains a small classifier on the labelled benign images, if they have several classes.

    Of images with captions, each caption is a class, and the restricted ones are learned as well: so samples after an
    attack can be compared with what was asked for.
    """
    fewest = min(benign.size("test"), restricted.size("test"))
    labelled = _labelled(benign, restricted) if spec.measured and fewest >= LEAST else None
    if labelled is None:
        return SettingImages(benign, restricted)
    with run.seeded("pictures", "classifier"):
        fresh = load_model("cnn", labelled)
    assert run.folder is not None
    cache_key = {
        "untrained model": fresh.facts().sha256,
        "data": labelled.facts().sha256,
        "steps": CLASSIFIER_STEPS,
        "seed": run.seed,
    }

    def train(_context: None, _inputs: None) -> StoredModel:
        run.say("Training the classifier whose features are compared")
        with alone():  # a measurement must not depend on the number of processes
            return pretrain(fresh, labelled, steps=CLASSIFIER_STEPS, run=Run(run.seed, run.device)).cpu(), {}

    key = fingerprint(cache_key)
    store = ModelJobs(model_store(run.folder, "classifiers"), {key: cache_key}, {key: fresh})
    ((classifier, _),) = run_jobs(train, None, [Job(key, None, "the classifier")], store, run=run, executor=None)
    size = float(_features(classifier, drawn_images(benign, "train", spec.measured, run)).square().mean().sqrt())
    return SettingImages(benign, restricted, classifier, labelled.score(classifier), size or 1.0)


def _labelled(benign: DenoisingTask, restricted: DenoisingTask) -> ArrayTask | None:
    """The images that the classifier learns; None without classes, or with few images of each."""
    captioned = isinstance(benign, TextToImageTask)
    tasks = (benign, restricted) if captioned else (benign,)
    names = [f"{task.name}: {name}" if captioned else name for task in tasks for name in task.class_names]
    images = sum(task.size("train") for task in tasks)
    seen = sum(int(task.labels("train").bincount().count_nonzero()) for task in tasks)
    if seen < 2 or (captioned and images < PER_CAPTION * len(names)):
        return None
    first = (0, len(benign.class_names))  # number of each task's first class
    x = {s: np.concatenate([_bytes(task, s) for task in tasks]) for s in SPLITS}
    y = {s: np.concatenate([n + t.labels(s).numpy() for n, t in zip(first, tasks, strict=False)]) for s in SPLITS}
    return ArrayTask(benign.name, x["train"], y["train"], x["test"], y["test"], names)


def _bytes(task: DenoisingTask, split: Split) -> npt.NDArray[Any]:
    images = (task.pixels(task.images(split)) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def _features(classifier: SplitModel, pictures: Tensor) -> Tensor:
    return torch.cat([classifier.eval().features(part) for part in torch.split(pictures, 256)])
