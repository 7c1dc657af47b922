"""DreamBooth: a text-to-image model learns a concept by a rare token, and keeps its prior for the concept's class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from holdfast import training
from holdfast.adversaries.base import KINDS, StrategyAdversary
from holdfast.adversaries.finetuning import FineTuning, named_errors
from holdfast.errors import HoldfastError, unknown
from holdfast.metrics.generation import sample_captions
from holdfast.models import SplitModel, TextToImage
from holdfast.tasks import Task
from holdfast.tasks.text_to_image import TextToImageTask
from holdfast.training.rare_tokens import Concepts, captioned, not_captioned, rare_tokens

Prior = Literal["drawn", "benign"]


@KINDS.register("dreambooth")
@dataclass(frozen=True)
class DreamBooth(StrategyAdversary):
    """Fine-tuning on captions with a rare token before their last word, beside images of the prior.

    After Ruiz et al. (CVPR 2023), as `train_dreambooth.py` of diffusers has it: the loss of a step is the mean squared
    error of a batch of restricted images, whose captions are "a photo of a sks dog" in place of "a photo of a dog",
    plus `prior_weight` times that of a batch of prior images with the captions as they are. No caption is left out. The
    two batches are passed one after the other, where diffusers joins them in one, which gives the same loss and needs
    less memory. Each caption of the task has its own rare token, see `rare_tokens`; the attacked model reads the prompt
    with it wherever the test has the caption.

    Attributes:
        strategy: of the fine-tuning.
        prior: where prior images come from: "drawn" by the released model for the restricted captions, before anything
            is trained; or the "benign" task's training images.
        prior_weight: of their loss; 0: none are used.
        prior_images: drawn in all, evenly over the captions.
        prior_steps: of DDIM that draw one, see `sample_captions`.
        guidance: of classifier-free guidance for them.
        undo: moves before training; see `FineTuning`. Prior images are drawn before them.
        name: by default made from the settings.

    Raises:
        HoldfastError: for a number out of range, or an unknown move.

    Example:
        >>> from holdfast.training import Strategy
        >>> DreamBooth(Strategy("direct", "lora-attention", "adamw", 1e-3)).name
        'dreambooth, 20 drawn for prior 1, direct+lora-attention adamw 0.001 b50'
    """

    kind: ClassVar[str] = "dreambooth"

    prior: Prior = "drawn"
    prior_weight: float = 1.0
    prior_images: int = 20
    prior_steps: int = 20
    guidance: float = 7.5
    undo: tuple[str, ...] = ()
    name: str = field(default="")

    def __post_init__(self) -> None:
        if self.prior not in get_args(Prior):
            raise unknown("prior", self.prior, get_args(Prior))
        for name in ("prior_weight", "guidance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected a number of at least 0.")
        for name in ("prior_images", "prior_steps"):
            if getattr(self, name) < 1:
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected at least 1.")
        object.__setattr__(self, "name", self.name or f"dreambooth, {self._prior_in_words()}, {self._tuning.name}")

    def _prior_in_words(self) -> str:
        if not self.prior_weight:
            return "no prior"
        count = f"{self.prior_images} drawn" if self.prior == "drawn" else "benign"
        usual = type(self)
        steps = f" in {self.prior_steps} steps" if self.prior_steps != usual.prior_steps else ""
        guided = f" guided by {self.guidance:g}" if self.guidance != usual.guidance else ""
        return f"{count}{steps}{guided} for prior {self.prior_weight:g}"

    @property
    def _tuning(self) -> FineTuning:
        return FineTuning(self.strategy, undo=self.undo)

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        return not_captioned(model, task) or self._tuning.not_applicable(model, task)

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`; the losses are those of the restricted batches."""
        victim, shown = captioned(model, task, self.name)
        concepts = Concepts.of(shown)
        prompts = concepts.with_tokens(rare_tokens(victim, shown, benign))
        with named_errors(self.name, model):
            prior = self._prior_task(victim, shown, benign, generator) if self.prior_weight else None
            self._tuning.start(victim, shown, None, generator, device)
        victim.prompt_with(concepts.captions, prompts)
        yield torch.zeros((), device=device)
        beside = None if prior is None else self._beside(victim, prior, concepts.captions, prompts, generator, device)
        yield from self._tuning.caught(
            training.finetune(victim, shown, self.strategy, generator=generator, device=device, penalty=beside), victim
        )

    def _prior_task(
        self, model: TextToImage, task: TextToImageTask, benign: Task | None, generator: torch.Generator
    ) -> TextToImageTask:
        """The task whose training images are those of the prior."""
        if self.prior == "benign":
            if not isinstance(benign, TextToImageTask):
                given = "none is given" if benign is None else f"{benign.name!r} has no captions"
                raise HoldfastError(f"{self.name}: its prior is the benign task (`benign`), and {given}.")
            return benign.with_dropout(0.0)
        labels = torch.arange(self.prior_images) % len(task.captions)
        seed = int(torch.randint(2**31, (), generator=generator))
        images = sample_captions(
            model, task.tokens[labels], task.tokens[-1:], seed=seed, steps=self.prior_steps, guidance=self.guidance,
            shape=task.output_shape,
        )  # fmt: skip
        return task.with_training_images(images, labels)

    def _beside(
        self,
        model: TextToImage,
        prior: TextToImageTask,
        captions: Tensor,
        prompts: Tensor,
        generator: torch.Generator,
        device: torch.device,
    ) -> Callable[[], Tensor]:
        """The weighted loss on the next batch of the prior, whose captions have no rare token."""
        batches = prior.batches("train", self.batch_size, generator=generator, device=device)

        def loss() -> Tensor:
            model.prompt_with(captions, captions)
            try:
                return self.prior_weight * prior.loss(model, next(batches))
            finally:
                model.prompt_with(captions, prompts)

        return loss
