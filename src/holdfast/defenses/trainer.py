"""Training of a whole network in rounds, watched by the guard."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.guard import BenignGuard, GuardedDefense
from holdfast.defenses.state import Checkpoint, MovingAverage, State, restore, snapshot
from holdfast.defenses.validation import VALIDATION_SHARE, Validation
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.results import Event
from holdfast.runtime.distributed import process_group
from holdfast.runtime.run import Run, derive_seed, fingerprint
from holdfast.runtime.storage import optimizer_tensors, restore_optimizer, tensors_sha256
from holdfast.tasks import Task

SAVE_SECONDS = 60.0
"""The longest time between two checkpoints; there is one after each measurement of the benign score as well."""

Config = TypeVar("Config", bound=GuardedDefense)


class Immunization(ABC, Generic[Config]):
    """One run of a guarded defense.

    A subclass defines what a round is, which optimizers it has, and what happens if the benign score is too low. With
    several processes, each does every round on its own batches, and `average_gradients` combines them.

    Args:
        config: the defense.
        model: is not changed; `self.model` is the copy that is trained.
        benign: `self.benign` is the part that is trained on, `self.held_out` the part that the guard measures.
        restricted: the defender's half.
        run: seed, device, folder.
        rate: the learning rate, stored as `self.rate`; the guard halves it.
    """

    title: str
    series: tuple[str, ...]
    """The series of the history, beside `iteration` and `benign_score`."""
    shown: tuple[str, ...]
    """The series that the progress bar shows, beside the benign score."""
    rate_name: str = "learning_rate"

    def __init__(
        self, config: Config, model: SplitModel, benign: Task, restricted: Task, run: Run, *, rate: float
    ) -> None:
        self.config, self.run, self.restricted, self.rate = config, run, restricted, rate
        self.benign, self.held_out = benign.holdout(config.holdout, derive_seed(run.seed, config.name, "holdout"))
        self.validation: Validation | None = None
        if config.validate_every is not None:
            self.restricted, kept_back = restricted.holdout(
                VALIDATION_SHARE, derive_seed(run.seed, config.name, "validation")
            )
            self.validation = Validation(kept_back, config.validation_steps, run)
        self.model = model.clone().to(run.device)
        self.optimizers = self.make_optimizers()
        validated = () if self.validation is None else ("validation_score",)
        self.record = DefenseRecord(history={k: [] for k in ("iteration", *self.series, "benign_score", *validated)})
        self.round = 0
        processes = [] if process_group().count == 1 else [{"processes": process_group().count}]
        self.checkpoint = Checkpoint(
            run.path("immunization.safetensors"),
            fingerprint(
                [
                    *processes,
                    config.config(),
                    run.seed,
                    model.facts().sha256,
                    model.input_settings(),
                    [n for n, p in model.named_parameters() if p.requires_grad],
                    benign.facts().sha256,
                    restricted.facts().sha256,
                ]
            ),
        )
        self.guard = BenignGuard(
            config.max_benign_drop,
            higher_is_better=benign.higher_is_better,
            original_score=self.benign_score(),
            state=snapshot(self.model),
        )
        self.average = MovingAverage(config.ema, self.model)

    # For a subclass to define.

    @abstractmethod
    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns fresh optimizers of `self.model` by name, at the present rates."""

    @abstractmethod
    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """Trains the model, and returns the values of each of the `series` in this round."""

    @abstractmethod
    def too_low(self, why: str) -> bool:
        """Reacts to a held-out benign score that is not acceptable.

        Returns:
            Whether it put other weights into the model.
        """

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns further parts of a checkpoint: tensors and plain values."""
        return {}, {}

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Puts back what `saved` returned."""

    def forget(self) -> None:
        """Drops everything that belongs to the state that the guard has just left."""

    def score_held_out(self) -> float:
        """Returns this process's score of `self.model` on the held-out benign data."""
        return self.held_out.score(self.model)

    # For a subclass to call.

    def average_gradients(self) -> None:
        """Replaces the gradients by their mean over all processes; call it between `backward` and the step.

        With one process it does nothing. If a defense does not call it, the guard finds that weights differ.
        """
        process_group().average_gradients(self.model.parameters())

    def training_mode(self) -> None:
        """Puts the model in training mode; a BatchNorm layer with frozen parameters keeps its statistics as well."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
                module.eval()

    def benign_score(self) -> float:
        """Returns the score on the held-out benign data: the main process's, in all processes."""
        return process_group().broadcast_object(self.score_held_out())

    @property
    def last(self) -> bool:
        """Whether all rounds are done."""
        return self.round == self.config.iterations

    def say(self, message: str) -> None:
        """Records an event, and prints it."""
        self.record.events.append(Event(iteration=self.round, message=message))
        self.run.say(f"round {self.round}: {message}")

    def keep(self, score: float) -> None:
        """Keeps the present state as the last good one."""
        self.guard.keep(snapshot(self.model))
        self.record.history["benign_score"][-1] = score

    def go_back(self, why: str) -> None:
        """Returns to the last good state at half the rate, or gives up there."""
        self.record.rollbacks += 1
        restore(self.model, self.guard.good)
        self.average.reset(self.model)
        self.forget()
        if self.record.rollbacks >= self.config.max_rollbacks:
            self.say(f"{why}: back to the last good state; gave up after {self.record.rollbacks} times")
            self.record.completed = False
            return
        self.rate /= 2
        self.optimizers = self.make_optimizers()
        self.say(f"{why}: back to the last good state, {self.rate_name} halved to {self.rate:.3g}")

    def go_back_at_the_end(self, why: str) -> bool:
        """Returns to the last good state, but only after the last round: for a loss that can repair a low score."""
        if self.last:
            restore(self.model, self.guard.good)
            self.say(f"{why}: the last good state is the result")
        return self.last

    # The rounds.

    def finish(self) -> tuple[SplitModel, DefenseRecord]:
        """Does the missing rounds, and returns the result."""
        with self.run.seeded(self.config.name, "resume"):  # some parts are drawn at random before they are restored
            self._resume()
        config, saved_at = self.config, time.monotonic()
        group = process_group()
        with self.run.progress(f"Immunizing ({self.title})", config.iterations, self.round) as bar:
            while not self.last and self.record.completed:
                with self.run.seeded(*group.own(config.name, self.round, self.record.rollbacks)) as generator:
                    own = group.gather(self.one_round(generator))
                group.sync_buffers(self.model)
                finite = self._record({name: [v for values in own for v in values[name]] for name in self.series})
                self.round += 1
                last = {name: self.record.history[name][-1] for name in self.series}
                values = {name: value for name, value in last.items() if value is not None}
                self.run.finished_round(config.name, self.round, values)
                if finite:
                    self.average.update(self.model)
                elif config.guard:
                    self.go_back("a loss or a weight is not finite")
                else:
                    self.say("a loss or a weight is not finite; the guard is off, so the defense ends here")
                    self.record.completed = False
                validates = config.validate_every is not None and self._due(config.validate_every)
                measures = not finite or validates or self._due(config.guard_every)
                note = self._measure(validates, finite) if measures else ""
                if group.broadcast_object(measures or time.monotonic() - saved_at > SAVE_SECONDS):
                    self._save()
                    saved_at = time.monotonic()
                bar.tick(note)
        self._conclude()
        self.model.eval()
        group.broadcast_state(self.model.network)
        return self.model, self.record

    def _due(self, every: int) -> bool:
        return self.round % every == 0 or self.last

    def _record(self, values: Mapping[str, list[float]]) -> bool:
        """Writes a round into the history; returns whether everything is finite."""
        history = self.record.history
        history["iteration"].append(self.round + 1)
        for name in ("benign_score", "validation_score"):
            if name in history:
                history[name].append(None)
        for name in self.series:
            history[name].append(_mean(values[name]))
        finite = all(math.isfinite(v) for name in self.series for v in values[name])
        return process_group().broadcast_object(
            finite and all(bool(p.isfinite().all()) for p in self.model.parameters())
        )

    def _measure(self, validates: bool, finite: bool) -> str:
        """Measures the state that would be released now, and returns a note for the progress bar.

        Unless the guard changes the model, training continues from the weights themselves, not from their average.
        """
        score, note = math.nan, ""
        if finite:
            weights = snapshot(self.model) if self.average.state else {}
            if weights:
                restore(self.model, self.average.state)
            unchanged = self._check_benign_score()
            recorded = self.record.history["benign_score"][-1]
            score = math.nan if recorded is None else float(recorded)
            if validates and self.guard.acceptable(score):
                assert self.validation is not None
                validated = self.validation.examine(self.model, self.round)
                self.record.history["validation_score"][-1] = validated if math.isfinite(validated) else None
                note = f", validation {validated:.3f}"
            if weights and unchanged:
                restore(self.model, weights)
            elif weights:
                self.average.reset(self.model)
        return f"benign {score:.3f}, " + ", ".join(map(self._shown, self.shown)) + note

    def _check_benign_score(self) -> bool:
        """Keeps a good state; returns False if the guard put other weights into the model."""
        group = process_group()
        if group.count > 1 and len(set(group.gather(tensors_sha256(snapshot(self.model))))) > 1:
            raise HoldfastError(
                f"{self.config.name}: the processes' weights differ after round {self.round}. In several processes a "
                "defense must call `Immunization.average_gradients` before each step; or use one process."
            )
        score = self.benign_score()
        self.record.history["benign_score"][-1] = score if math.isfinite(score) else None
        if self.guard.acceptable(score):
            self.keep(score)
        elif self.config.guard:
            return not self.too_low(self.guard.complaint(score))
        return True

    def _conclude(self) -> None:
        """Puts the best state into the model, and records an event if there is none."""
        record, validation = self.record, self.validation
        if self.average.state and record.completed:
            restore(self.model, self.average.state)
        if validation is not None and validation.best:
            score = validation.best_score
            self.say(f"kept the state after round {validation.best_round}, with validation score {score:.3f}")
            restore(self.model, validation.best)
        elif validation is not None and record.completed:
            record.completed = False
            self.say("no state passed both the guard and the validation, so none was chosen")
        if record.completed and self.config.guard and not self.guard.changed:
            record.completed = False
            self.say("only the original kept the benign score: the model is unchanged")

    def _shown(self, series: str) -> str:
        value = self.record.history[series][-1]
        return f"{series.replace('_', ' ')} {'not finite' if value is None else f'{value:.3f}'}"

    # The checkpoint.

    def _save(self) -> None:
        if self.checkpoint.path is None:
            return
        tensors, values = self.saved()
        gathered = process_group().gather(({n: v.detach().cpu() for n, v in tensors.items()}, values))
        parts = dict(zip(_parts(len(gathered)), gathered, strict=True))
        best = self.validation if self.validation is not None and self.validation.best else None
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.network.state_dict(),
            "good": self.guard.good,
            "best": {} if best is None else best.best,
            "average": self.average.state,
            **{label: part for label, (part, _) in parts.items()},
            **{label: optimizer_tensors(optimizer) for label, optimizer in self.optimizers.items()},
        }
        record = self.record
        state = {
            "round": self.round, "rollbacks": record.rollbacks, "rate": self.rate, "history": record.history,
            "events": [e.model_dump() for e in record.events], "completed": record.completed,
            "changed": self.guard.changed, "best": None if best is None else [best.best_score, best.best_round],
            **{label: values for label, (_, values) in parts.items()},
        }  # fmt: skip
        self.checkpoint.write(groups, state)

    def _resume(self) -> None:
        checkpoint = self.checkpoint.read()
        if checkpoint is None:
            return
        groups, state = checkpoint

        def on_device(label: str) -> State:
            return {n: v.to(self.run.device) for n, v in groups.get(label, {}).items()}

        restore(self.model, groups["model"])
        self.guard.good, self.guard.changed = on_device("good"), state["changed"]
        self.average.state = on_device("average")
        self.round, self.rate = state["round"], state["rate"]
        self.optimizers = self.make_optimizers()
        for label, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, groups.get(label, {}))
        self.record = DefenseRecord(
            state["history"], [Event(**e) for e in state["events"]], state["completed"], state["rollbacks"]
        )
        if self.validation is not None and state["best"] is not None:
            self.validation.best = on_device("best")
            self.validation.best_score, self.validation.best_round = state["best"]
        label = _parts(process_group().count)[process_group().rank]
        self.restore_own(groups.get(label, {}), state[label])
        self.run.say(f"Immunization: continuing after {self.round} of {self.config.iterations} rounds")


def _parts(processes: int) -> list[str]:
    """Names of the parts of a checkpoint that each process has for itself."""
    return ["own", *(f"own of {rank}" for rank in range(1, processes))]


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None
