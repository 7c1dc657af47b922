"""What defenses that train a whole network share: a guard on the benign score, and a state to continue from."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from holdfast.defenses.base import Defense, Record
from holdfast.defenses.selection import validation_score
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.results import Event
from holdfast.runtime.distributed import process_group
from holdfast.runtime.run import Run, derive_seed, fingerprint
from holdfast.runtime.storage import load_tensors, optimizer_tensors, restore_optimizer, save_tensors, tensors_sha256
from holdfast.tasks import Task

VALIDATION_SHARE = 0.2
"""Of the defender's restricted training data, kept back to score the examinations."""

FORMAT = 3
"""Of the saved state; another number is refused."""

SAVE_SECONDS = 60.0
"""The state is saved at least so often, and whenever the guard looks."""


@dataclass
class GuardedDefense(Defense):
    """A defense in rounds, watched by a guard on held-out benign data.

    Attributes:
        iterations: rounds.
        guard: watch for non-finite values and for the benign score; without it, a non-finite value ends the defense.
        guard_every: rounds between two looks at the benign score.
        max_benign_drop: how far the held-out benign score may fall below the original's in a good state; of a task that
            is scored by an error, by which share of the original's it may rise.
        max_rollbacks: the guard gives up after as many; the last good state is then the result.
        holdout: share of the benign training data kept back for the guard.
        ema: decay, a round, of an exponential moving average of the weights. The average is what the guard looks at,
            what is examined, and the result, as is usual for diffusion models; training goes on from the last weights.
            None: there is no average.
        validate_every: rounds between two examinations by short attacks (see `VALIDATION`); the result is then the good
            state in which they reached least, not the last one. None: there are none. They are scored on a fifth of the
            defender's restricted data, which is kept back for them.
        validation_steps: of each of these attacks.

    Raises:
        HoldfastError: for a value out of range.
    """

    iterations: int = 800
    guard: bool = True
    guard_every: int = 10
    max_benign_drop: float = 0.05
    max_rollbacks: int = 20
    holdout: float = 0.1
    ema: float | None = None
    validate_every: int | None = None
    validation_steps: int = 40

    def __post_init__(self) -> None:
        self.refuse_below_one("iterations", "guard_every", "max_rollbacks", "validate_every")
        if self.validation_steps < 2:
            raise HoldfastError(f"{self.name}: validation_steps is {self.validation_steps}; expected at least 2.")
        if not 0 <= self.max_benign_drop <= 1:
            raise HoldfastError(
                f"{self.name}: max_benign_drop is {self.max_benign_drop}; expected a share from 0 to 1."
            )
        if not 0 < self.holdout < 1:
            raise HoldfastError(f"{self.name}: holdout is {self.holdout}; expected a share between 0 and 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise HoldfastError(f"{self.name}: ema is {self.ema}; expected a decay between 0 and 1.")

    def refuse_below_one(self, *names: str) -> None:
        """Refuses fields under 1; None is let through."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HoldfastError(f"{self.name}: {name} is {value}; expected at least 1.")

    def refuse_not_above_zero(self, *names: str) -> None:
        """Refuses fields that are no finite numbers above 0; None is let through."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise HoldfastError(f"{self.name}: {name} is {value}; expected a number above 0.")


Config = TypeVar("Config", bound=GuardedDefense)


class Immunization(ABC, Generic[Config]):
    """One run of a guarded defense: what a checkpoint holds, and the guard's memory.

    A subclass says what a round is, which optimizers it has, and what happens where the benign score is too low. Where
    several processes were launched, each does every round on draws of its own, and `pool_gradients` unites them.

    Args:
        config: the defense.
        model: left as it is; `self.model` is the copy that is trained.
        benign: `self.benign` is without the part that the guard looks at, `self.held_out`.
        restricted: the defender's half.
        run: seed, device, folder.
        rate: learning rate that the guard halves; `self.rate`.
    """

    title: str
    series: tuple[str, ...]
    """The history's, beside `iteration` and `benign_score`."""
    shown: tuple[str, ...]
    """Those that the progress bar shows, beside the benign score."""

    def __init__(
        self, config: Config, model: SplitModel, benign: Task, restricted: Task, run: Run, *, rate: float
    ) -> None:
        self.config, self.run, self.restricted, self.rate = config, run, restricted, rate
        self.benign, self.held_out = benign.holdout(config.holdout, derive_seed(run.seed, config.name, "holdout"))
        self.examined: Task | None = None
        if config.validate_every is not None:
            self.restricted, self.examined = restricted.holdout(
                VALIDATION_SHARE, derive_seed(run.seed, config.name, "validation")
            )
        self.model = model.clone().to(run.device)
        self.optimizers = self.make_optimizers()
        validated = ("validation_score",) if config.validate_every is not None else ()
        self.record = Record(history={k: [] for k in ("iteration", *self.series, "benign_score", *validated)})
        self.round = 0
        processes = [] if process_group().count == 1 else [{"processes": process_group().count}]
        self.belongs_to = fingerprint(
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
        )
        self.original_score = self.benign_score()
        self.good = self._snapshot()
        self.average = self._snapshot() if config.ema is not None else {}
        self.changed = False
        self.best: dict[str, Tensor] = {}
        self.best_score, self.best_round = math.inf, 0

    @abstractmethod
    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Returns fresh optimizers of `self.model` by name, at the present rates."""

    @abstractmethod
    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """Trains the model, and returns the values of each of the `series` in this round."""

    @abstractmethod
    def too_low(self, why: str) -> bool:
        """What the guard does where the held-out benign score is under the floor.

        Returns:
            Whether it put other weights into the model.
        """

    def finish(self) -> tuple[SplitModel, Record]:
        """Does the rounds that are missing, and returns the result."""
        with self.run.seeded(self.config.name, "resume"):  # adversaries are made anew before they get their state
            self._resume()
        config, saved = self.config, time.monotonic()
        group = process_group()
        with self.run.progress(f"Immunizing ({self.title})", config.iterations, self.round) as bar:
            while self.round < config.iterations and self.record.completed:
                with self.run.seeded(*group.own(config.name, self.round, self.record.rollbacks)) as generator:
                    own = group.gather(self.one_round(generator))
                group.sync_buffers(self.model)
                sound = self._note({name: [v for values in own for v in values[name]] for name in self.series})
                self.round += 1
                if sound:
                    self._update_average()
                else:
                    self._not_finite()
                examines = config.validate_every is not None and self._due(config.validate_every)
                looks = not sound or examines or self._due(config.guard_every)
                if looks:
                    score, note = (math.nan, "") if not sound else self._looked(examines)
                    note = f"benign {score:.3f}, " + ", ".join(map(self._shown, self.shown)) + note
                if group.broadcast_object(looks or time.monotonic() - saved > SAVE_SECONDS):
                    self._save()
                    saved = time.monotonic()
                bar.tick(note if looks else "")
        self._conclude()
        self.model.eval()
        group.broadcast_state(self.model.network)
        return self.model, self.record

    def pool_gradients(self) -> None:
        """Replaces the gradients by their mean over all processes; call it between `backward` and the step.

        With one process it does nothing. `_look` finds out where it was forgotten.
        """
        process_group().average_gradients(self.model.parameters())

    def benign_score(self) -> float:
        """Returns the score on the held-out benign data: the main process's, by which all decide."""
        return process_group().broadcast_object(self.score_held_out())

    def score_held_out(self) -> float:
        """Returns this process's score of `self.model` on the held-out benign data."""
        return self.held_out.score(self.model)

    def _looked(self, examines: bool) -> tuple[float, str]:
        """Looks at what would be released now, and perhaps examines it; if all is well, training goes on as it was."""
        live = self._snapshot() if self.average else {}
        if self.average:
            self._restore(self.average)
        well = self._look()
        noted, note = self.record.history["benign_score"][-1], ""
        score = math.nan if noted is None else float(noted)
        if examines and self.acceptable(score):
            note = f", validation {self._examine():.3f}"
        if live and well:
            self._restore(live)
        elif live:
            self.average = self._snapshot()
        return score, note

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = self.config.ema
        if decay is None:
            return
        for name, value in self.model.network.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def _conclude(self) -> None:
        """Puts the best state into the model; says so where nothing was achieved."""
        if self.average and self.record.completed:
            self._restore(self.average)
        if self.best:
            self.say(f"kept the state after round {self.best_round}, of validation score {self.best_score:.3f}")
            self._restore(self.best)
        elif self.config.validate_every is not None and self.record.completed:
            self.record.completed = False
            self.say("no state passed the guard and the examination, so that none was chosen")
        if self.record.completed and self.config.guard and not self.changed:
            self.record.completed = False
            self.say("no state but the original's kept the benign score: the model is as it was")

    def _due(self, every: int) -> bool:
        return self.round % every == 0 or self.last

    @property
    def limit(self) -> float:
        """The worst held-out benign score of a good state; see `GuardedDefense.max_benign_drop`."""
        drop = self.config.max_benign_drop
        return self.original_score - drop if self.benign.higher_is_better else self.original_score * (1 + drop)

    def acceptable(self, score: float) -> bool:
        """Whether a held-out benign score is one of a good state."""
        return score >= self.limit if self.benign.higher_is_better else score <= self.limit

    def _examine(self) -> float:
        """Attacks a good state, and keeps it if it is the best one so far."""
        assert self.examined is not None
        score = process_group().broadcast_object(
            validation_score(self.model, self.examined, self.config.validation_steps, run=self.run)
        )
        self.record.history["validation_score"][-1] = score if math.isfinite(score) else None
        if score < self.best_score:
            self.best, self.best_score, self.best_round = self._snapshot(), score, self.round
        return score

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what else a checkpoint holds: tensors, and plain values."""
        return {}, {}

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Puts back what `saved` returned."""

    def forget(self) -> None:
        """Drops what belongs to the state that the guard has just left."""

    @property
    def last(self) -> bool:
        """Whether no round is left."""
        return self.round == self.config.iterations

    def _note(self, values: Mapping[str, list[float]]) -> bool:
        """Writes a round into the history; False if anything is not finite."""
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

    def training_mode(self) -> None:
        """Training mode, but for normalisations whose parameters are frozen: their statistics are frozen with them."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
                module.eval()

    def _look(self) -> bool:
        """The guard keeps a good state; returns False if it moved the model, because of a bad one."""
        self._check_together()
        score = self.benign_score()
        self.record.history["benign_score"][-1] = score if math.isfinite(score) else None
        if self.acceptable(score):
            self.keep(score)
        elif self.config.guard:
            what = (
                f"score {score:.3f} is under the floor {self.limit:.3f}"
                if self.benign.higher_is_better
                else f"error {score:.4f} is over the ceiling {self.limit:.4f}"
            )
            return not self.too_low(f"held-out benign {what}")
        return True

    def _check_together(self) -> None:
        if process_group().count > 1 and len(set(process_group().gather(tensors_sha256(self._snapshot())))) > 1:
            raise HoldfastError(
                f"{self.config.name}: the processes' weights differ after round {self.round}. In several processes "
                "a defense calls `Immunization.pool_gradients` between backward and each step; or use one process."
            )

    def keep(self, score: float) -> None:
        """Remembers the present state as the last good one."""
        self.good = self._snapshot()
        self.changed = True
        self.record.history["benign_score"][-1] = score

    def _not_finite(self) -> None:
        if self.config.guard:
            self.go_back("a loss or a weight is not finite")
        else:
            self.say("a loss or a weight is not finite; the guard is off, so this is where it ends")
            self.record.completed = False

    def go_back(self, why: str) -> None:
        """Returns to the last good state at half the rate, or gives up there."""
        self.record.rollbacks += 1
        self.restore_good()
        self.average = self._snapshot() if self.average else {}
        self.forget()
        if self.record.rollbacks >= self.config.max_rollbacks:
            self.say(f"{why}: back to the last good state; gave up after {self.record.rollbacks} times")
            self.record.completed = False
            return
        self.rate /= 2
        self.optimizers = self.make_optimizers()
        self.say(f"{why}: back to the last good state, {self.rate_name} halved to {self.rate:.3g}")

    rate_name: str = "learning_rate"

    def restore_good(self) -> None:
        """Puts the last good state into the model."""
        self._restore(self.good)

    def say(self, message: str) -> None:
        """Notes an event, and tells the person at the terminal."""
        self.record.events.append(Event(iteration=self.round, message=message))
        self.run.say(f"round {self.round}: {message}")

    def _shown(self, series: str) -> str:
        value = self.record.history[series][-1]
        return f"{series.replace('_', ' ')} {'not finite' if value is None else f'{value:.3f}'}"

    def _snapshot(self) -> dict[str, Tensor]:
        return {n: v.detach().clone() for n, v in self.model.network.state_dict().items()}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self.model.network.load_state_dict(dict(state))

    def _save(self) -> None:
        path = self.run.path("immunization.safetensors")
        if path is None:
            return
        parts = process_group().gather(self._part())
        tensors = {f"model/{n}": v for n, v in self.model.network.state_dict().items()}
        tensors |= {f"good/{n}": v for n, v in self.good.items()}
        tensors |= {f"best/{n}": v for n, v in self.best.items()}
        tensors |= {f"average/{n}": v for n, v in self.average.items()}
        for label, (more, _) in zip(_parts(len(parts)), parts, strict=True):
            tensors |= {f"{label}/{n}": v for n, v in more.items()}
        for label, optimizer in self.optimizers.items():
            tensors |= {f"{label}/{n}": v for n, v in optimizer_tensors(optimizer).items()}
        meta = {
            "format": FORMAT, "belongs_to": self.belongs_to,
            "round": self.round, "rollbacks": self.record.rollbacks, "rate": self.rate,
            "history": self.record.history, "events": [e.model_dump() for e in self.record.events],
            "completed": self.record.completed, "changed": self.changed,
            **{label: own for label, (_, own) in zip(_parts(len(parts)), parts, strict=True)},
            "best": [self.best_score, self.best_round] if self.best else None,
        }  # fmt: skip
        process_group().on_main_process(lambda: save_tensors(path, tensors, meta))

    def _part(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What of a checkpoint is this process's own, where it can be sent from."""
        tensors, values = self.saved()
        return {n: v.detach().cpu() for n, v in tensors.items()}, values

    def _resume(self) -> None:
        path = self.run.path("immunization.safetensors")
        if path is None or not process_group().broadcast_object(path.exists()):
            return
        tensors, meta = load_tensors(path)
        if meta.get("format") != FORMAT:
            raise HoldfastError(
                f"{str(path)!r} was written by another version of Holdfast, and cannot be continued by this one. "
                "Choose another folder with --out, or finish it with the version that began it."
            )
        if meta.get("belongs_to") != self.belongs_to:
            raise HoldfastError(
                f"{str(path)!r} is the state of another immunization (model, data, seed, settings or number of "
                "processes differ): states are never mixed. Choose another folder with --out."
            )
        self._restore(_under(tensors, "model"))
        self.good = {n: v.to(self.run.device) for n, v in _under(tensors, "good").items()}
        self.average = {n: v.to(self.run.device) for n, v in _under(tensors, "average").items()}
        self.round, self.rate, self.changed = meta["round"], meta["rate"], meta["changed"]
        self.optimizers = self.make_optimizers()
        for label, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, _under(tensors, label))
        self.record = Record(
            meta["history"], [Event(**e) for e in meta["events"]], meta["completed"], meta["rollbacks"]
        )
        if meta["best"] is not None:
            self.best = {n: v.to(self.run.device) for n, v in _under(tensors, "best").items()}
            self.best_score, self.best_round = meta["best"]
        label = _parts(process_group().count)[process_group().rank]
        self.restore_own(_under(tensors, label), meta[label])
        self.run.say(f"Immunization: continuing after {self.round} of {self.config.iterations} rounds")


def _parts(processes: int) -> list[str]:
    """What the processes' own parts of a checkpoint are called in it."""
    return ["own", *(f"own of {rank}" for rank in range(1, processes))]


def _under(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{label}/"): v for n, v in tensors.items() if n.startswith(f"{label}/")}


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None
