"""The simulated adversaries of SOPHON side by side: who is drawn from Phi, whose turn it is, and on which device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from holdfast.defenses.sophon.simulation import Seen, Simulated, Simulation
from holdfast.losses import Objective
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy


class Population:
    """Simulated adversaries that take turns; with a lifetime of one loop, each turn is a new adversary's.

    Args:
        model: the model being immunized.
        objective: what the defender minimises.
        phi: the settings that adversaries are drawn from.
        size: adversaries that are kept side by side.
        lifetime: loops after which one ends and a new one is drawn in its place.
        devices: where they live, in turn; on several devices they run at the same time. None given: with the model.
        kind: `Simulation`, or a relative of it.
        options: of that.
    """

    def __init__(
        self,
        model: SplitModel,
        objective: Objective,
        phi: Sequence[Strategy],
        *,
        size: int = 1,
        lifetime: int = 1,
        devices: Sequence[torch.device] = (),
        kind: type[Simulation] = Simulation,
        **options: bool,
    ) -> None:
        self.phi, self.size, self.lifetime = phi, size, lifetime
        self.simulations = [kind(model, objective, device=device, **options) for device in devices or (model.device,)]
        self.clear()

    def clear(self) -> None:
        """Ends all lives: for when the model has jumped elsewhere."""
        self.living: dict[int, Simulated] = {}
        self._unborn = set(range(self.size))
        self.turn = 0

    def loop(
        self,
        task: Task,
        count: int,
        steps: int,
        gamma: tuple[float, ...] | None,
        *,
        generator: torch.Generator,
        evaluation: Task | None = None,
    ) -> list[Seen]:
        """Lets the next `count` adversaries take `steps` steps each, and collects the meta-gradient.

        Args:
            task: defender's half of the restricted task.
            count: N, at most the size of the population.
            steps: K.
            gamma: one weight a step, or None for 1.
            generator: draws settings and batches. The first adversary draws from it, every other one from a generator
                of its own, so that it does not matter which runs first.
            evaluation: see `Simulation.run`.
        """
        for simulation in self.simulations:
            simulation.zero()
        seeds = torch.randint(2**62, (count - 1,), generator=generator).tolist()
        streams = [generator, *(torch.Generator().manual_seed(seed) for seed in seeds)]
        slots = [(self.turn + i) % self.size for i in range(count)]
        first = generator
        self.turn = (self.turn + count) % self.size

        def adversary_of(slot: int, stream: torch.Generator) -> Simulated:
            if stream is not first and slot not in self.living:
                # Torch's generators of several devices are seeded alike, and would draw the same fresh head on each.
                torch.manual_seed(int(torch.randint(2**62, (), generator=stream)))
            return self._adversary(slot, task, stream)

        def visit(slot: int, stream: torch.Generator) -> Seen:
            simulation, adversary = self._home(slot), adversary_of(slot, stream)
            seen = simulation.go_on(adversary, task, steps, gamma, generator=stream, evaluation=evaluation)
            if adversary.loops >= adversary.life:
                simulation.release(self.living.pop(slot))
            return seen

        if len(self.simulations) == 1:  # one after the other, so that those that live for one loop share their memory
            return [visit(slot, stream) for slot, stream in zip(slots, streams, strict=True)]
        for slot, stream in zip(slots, streams, strict=True):
            adversary_of(slot, stream)  # fresh parts come from a global generator: in order, in one thread
        lanes = [[i for i, slot in enumerate(slots) if self._home(slot) is home] for home in self.simulations]
        with ThreadPoolExecutor(len(lanes)) as threads:
            found = threads.map(lambda lane: [(i, visit(slots[i], streams[i])) for i in lane], lanes)
            seen = dict(item for lane in found for item in lane)
        for other in self.simulations[1:]:
            self.simulations[0].take(other)
        return [seen[i] for i in range(count)]

    def gradients(self) -> list[Tensor | None]:
        """Returns the meta-gradient of the last loop for each parameter of the model; see `Simulation.gradients`."""
        return self.simulations[0].gradients()

    def _home(self, slot: int) -> Simulation:
        return self.simulations[slot % len(self.simulations)]

    def _adversary(self, slot: int, task: Task, stream: torch.Generator) -> Simulated:
        if slot not in self.living:
            strategy = self.phi[int(torch.randint(len(self.phi), (), generator=stream))]
            self.living[slot] = adversary = self._home(slot).start(strategy, task)
            # The first ones end one after the other: else all would be young, and then all old, at the same time.
            first = slot in self._unborn
            adversary.life = 1 + slot * self.lifetime // self.size if first else self.lifetime
            self._unborn.discard(slot)
        return self.living[slot]

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and plain values from which `restore` makes the same population again."""
        tensors: dict[str, Tensor] = {}
        lives: dict[str, dict[str, int]] = {}
        for slot, adversary in self.living.items():
            own, counts = self._home(slot).saved(adversary)
            tensors |= {f"{slot}/{name}": value for name, value in own.items()}
            lives[str(slot)] = {**counts, "phi": self.phi.index(adversary.strategy)}
        return tensors, {"lives": lives, "turn": self.turn, "unborn": sorted(self._unborn)}

    def restore(self, task: Task, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Puts back what `saved` returned; see there."""
        self.clear()
        self.turn, self._unborn = values["turn"], set(values["unborn"])
        for slot, counts in values["lives"].items():
            own = {n.removeprefix(f"{slot}/"): v for n, v in tensors.items() if n.startswith(f"{slot}/")}
            strategy = self.phi[counts["phi"]]
            self.living[int(slot)] = self._home(int(slot)).restored(strategy, task, own, counts)
