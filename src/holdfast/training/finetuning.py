"""Fine-tuning steps and pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from holdfast.models import SplitModel
from holdfast.runtime.devices import autocast
from holdfast.runtime.distributed import ProcessGroup, process_group
from holdfast.runtime.run import Run
from holdfast.tasks import Batch, Task
from holdfast.training.gradients import reshape_gradient
from holdfast.training.starts import trained_modules
from holdfast.training.strategy import OPTIMIZERS, PretrainSpec, Strategy

BURN_IN = 10.0
"""Factor on the learning rate during a burn-in."""


def optimizer_of(model: SplitModel, strategy: Strategy) -> torch.optim.Optimizer:
    """Returns a strategy's optimizer over the trained parameters of a model that is prepared (see `prepare`)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return OPTIMIZERS[strategy.optimizer](trained, strategy.learning_rate, strategy.weight_decay)


def finetune(
    model: SplitModel,
    task: Task,
    strategy: Strategy,
    *,
    generator: torch.Generator,
    device: torch.device,
    burn_in: int = 0,
    penalty: Callable[[], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    together: ProcessGroup | None = None,
    factor: Callable[[], float] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Fine-tunes a model in place, without end: take as many steps as you want.

    Every step first puts the model in training mode (see `Strategy.scope`), so the caller may score it in between.

    Args:
        model: already in the state that the strategy starts from (see `prepare`).
        task: the data and the loss.
        strategy: optimizer, learning rate, batch size and scope.
        generator: draws the batches.
        device: where model and data are.
        burn_in: number of first steps that have `BURN_IN` times the rate of the schedule.
        penalty: called once a step, in training mode; its value is added to the loss.
        optimizer: continue with this one, made by `optimizer_of` for this model and strategy; None: a new one.
        together: the processes that train one model, each on its own batches; None: this process trains alone.
        factor: called before each step; the learning rate is multiplied by it.
        change: of the inputs of each batch, such as augmentation.

    Yields:
        The training loss of each step, a detached scalar, after the step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(model, strategy) if optimizer is None else optimizer
    in_training_mode = trained_modules(model, strategy)
    batches = task.batches("train", strategy.batch_size, generator=generator, device=device)
    for step, batch in enumerate(batches):
        rate = strategy.rate(step) * (BURN_IN if step < burn_in else 1) * (1 if factor is None else factor())
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train(strategy.scope not in ("head", "last-block"))
        for module in in_training_mode:
            module.train()
        shown = batch if change is None else Batch(change(batch.x), batch.y)
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(model, task, shown, strategy, device, penalty)
        if strategy.sharpness:
            with _uphill(model, trained, strategy.sharpness):
                optimizer.zero_grad(set_to_none=True)
                _backward(model, task, shown, strategy, device, penalty)
        if together is not None:
            together.average_gradients(trained)
            together.sync_buffers(model)
        reshape_gradient(trained, strategy.gradient)
        optimizer.step()
        yield loss


def _backward(
    model: SplitModel,
    task: Task,
    batch: Batch,
    strategy: Strategy,
    device: torch.device,
    penalty: Callable[[], Tensor] | None,
) -> Tensor:
    """Computes the gradients of a batch, with the penalty's; returns the loss without the penalty, detached."""
    losses: list[Tensor] = []
    for part, share in _parts(task, batch, strategy.micro_batch):
        with autocast(device, strategy.precision == "bf16"):
            loss = task.loss(model, part) if share == 1 else share * task.loss(model, part)
            total = loss if penalty is None or losses else loss + penalty()
        total.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


@contextmanager
def _uphill(model: SplitModel, trained: list[torch.nn.Parameter], radius: float) -> Iterator[None]:
    """Moves the weights by a step of this length up their gradient, and back at the end."""
    kept = [p.detach().clone() for p in trained]
    reshape_gradient(trained, "normalised")
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=radius)
    with constant_statistics(model):  # the batch was counted already
        yield
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)


@contextmanager
def constant_statistics(model: torch.nn.Module) -> Iterator[None]:
    """Keeps the running statistics of normalisation layers as they are during forward passes in training mode."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _parts(task: Task, batch: Batch, size: int) -> Iterator[tuple[Batch, float]]:
    """Parts of a batch of at most `size` samples, each with its share of the loss; the whole batch if `size` is 0."""
    if not size or size >= len(batch.x):
        yield batch, 1.0
        return
    whole = task.weight(batch.y)
    for x, y in zip(torch.split(batch.x, size), torch.split(batch.y, size), strict=True):
        yield Batch(x, y), task.weight(y) / whole


def pretrain(
    model: SplitModel,
    task: Task,
    *,
    steps: int = 600,
    strategy: Strategy | None = None,
    ema: float | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> SplitModel:
    """Trains a copy of a model on a task; if several processes were launched, they train it together.

    Args:
        model: left as it is.
        task: what to learn.
        steps: gradient steps.
        strategy: optimizer, learning rate, batch size; by default Adam at 2e-3 with batches of 64.
        ema: decay of an exponential moving average of the weights, which is then the result, as is usual for diffusion
            models; None: the last weights are the result.
        seed: decides the batches; ignored if a `run` is given.
        run: seed, device and progress display.

    Returns:
        The trained model.

    Example:
        >>> import holdfast
        >>> task = holdfast.load_task("digits[0-4]")
        >>> model = holdfast.pretrain(holdfast.load_model("mlp", task), task, steps=100)
        >>> task.score(model) > 0.9
        True
    """
    run = run or Run(seed)
    strategy = strategy or PretrainSpec().strategy()
    trained = model.clone().to(run.device)
    group = process_group()
    with run.seeded(*group.own("pretrain")) as generator, run.progress("Training the original", steps) as bar:
        training = finetune(trained, task, strategy, generator=generator, device=run.device, together=group)
        average = None if ema is None else AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(ema))  # type: ignore[no-untyped-call]
        for _ in range(steps):
            next(training)
            if average is not None:
                average.update_parameters(trained)
            bar.tick()
    if average is not None:
        trained.load_state_dict(average.module.state_dict())
    group.broadcast_state(trained)
    return trained.eval()
