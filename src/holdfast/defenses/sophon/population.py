"""The simulated adversaries of SOPHON side by side: drawn from Phi, simulated in turn, on one device or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from holdfast.defenses.sophon.simulation import SimulatedAdversary, Simulation, SimulationOutcome
from holdfast.losses import Objective
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy


class Population:
    """A number of slots, each with a simulated adversary; suppression loops simulate the slots in turn.

    Args:
        model: the model being immunized.
        objective: what the defender minimises.
        phi: the strategies that adversaries are drawn from.
        size: number of slots.
        lifetime: suppression loops after which another adversary takes the slot.
        devices: where adversaries run; slot i runs on device i, modulo their number, and devices work at the same time.
            Empty: the model's device.
        kind: `Simulation`, or a subclass.
        options: of that class.
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
        """Drops all adversaries; for use after the guard has gone back."""
        self.adversaries: dict[int, SimulatedAdversary] = {}
        self._unused_slots = set(range(self.size))
        self.next_slot = 0

    def simulate(
        self,
        task: Task,
        count: int,
        steps: int,
        gamma: tuple[float, ...] | None,
        *,
        generator: torch.Generator,
        evaluation: Task | None = None,
    ) -> list[SimulationOutcome]:
        """Advances the next `count` adversaries by `steps` steps each, and collects the meta-gradient.

        Args:
            task: defender's half of the restricted task.
            count: N, at most the size of the population.
            steps: K.
            gamma: one weight per step, or None for 1.
            generator: draws strategies and batches. The first adversary draws from it, every other one from its own
                generator, so that the result does not depend on which runs first.
            evaluation: see `Simulation.run`.
        """
        for simulation in self.simulations:
            simulation.zero()
        seeds = torch.randint(2**62, (count - 1,), generator=generator).tolist()
        streams = [generator, *(torch.Generator().manual_seed(seed) for seed in seeds)]
        slots = [(self.next_slot + i) % self.size for i in range(count)]
        self.next_slot = (self.next_slot + count) % self.size

        def adversary_of(slot: int, stream: torch.Generator) -> SimulatedAdversary:
            if stream is not generator and slot not in self.adversaries:
                # Torch seeds the generators of all devices alike: without this, each would draw the same fresh head.
                torch.manual_seed(int(torch.randint(2**62, (), generator=stream)))
            return self._adversary(slot, task, stream)

        def advance(slot: int, stream: torch.Generator) -> SimulationOutcome:
            simulation, adversary = self._simulation(slot), adversary_of(slot, stream)
            outcome = simulation.advance(adversary, task, steps, gamma, generator=stream, evaluation=evaluation)
            if adversary.loops_done >= adversary.max_loops:
                simulation.release(self.adversaries.pop(slot))
            return outcome

        if len(self.simulations) == 1:  # one after another, so that adversaries of a single loop share their memory
            return [advance(slot, stream) for slot, stream in zip(slots, streams, strict=True)]
        for slot, stream in zip(slots, streams, strict=True):
            adversary_of(slot, stream)  # in order and in one thread, as fresh parts come from a global generator
        by_device = [[i for i, slot in enumerate(slots) if self._simulation(slot) is s] for s in self.simulations]
        with ThreadPoolExecutor(len(by_device)) as threads:
            results = threads.map(lambda share: [(i, advance(slots[i], streams[i])) for i in share], by_device)
            outcomes = dict(item for result in results for item in result)
        for other in self.simulations[1:]:
            self.simulations[0].add_gradient_of(other)
        return [outcomes[i] for i in range(count)]

    def gradients(self) -> list[Tensor | None]:
        """Returns the meta-gradient of the last loop for each parameter of the model; see `Simulation.gradients`."""
        return self.simulations[0].gradients()

    def _simulation(self, slot: int) -> Simulation:
        return self.simulations[slot % len(self.simulations)]

    def _adversary(self, slot: int, task: Task, stream: torch.Generator) -> SimulatedAdversary:
        if slot not in self.adversaries:
            strategy = self.phi[int(torch.randint(len(self.phi), (), generator=stream))]
            self.adversaries[slot] = adversary = self._simulation(slot).start(strategy, task)
            # The first adversaries end at different times: otherwise all would begin and end together.
            first = slot in self._unused_slots
            adversary.max_loops = 1 + slot * self.lifetime // self.size if first else self.lifetime
            self._unused_slots.discard(slot)
        return self.adversaries[slot]

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and plain values from which `restore` makes the same population again."""
        tensors: dict[str, Tensor] = {}
        counts: dict[str, dict[str, int]] = {}
        for slot, adversary in self.adversaries.items():
            own, loops = self._simulation(slot).saved(adversary)
            tensors |= {f"{slot}/{name}": value for name, value in own.items()}
            counts[str(slot)] = {**loops, "phi": self.phi.index(adversary.strategy)}
        # These names are part of the checkpoint's format.
        return tensors, {"lives": counts, "turn": self.next_slot, "unborn": sorted(self._unused_slots)}

    def restore(self, task: Task, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restores the population from what `saved` returned."""
        self.clear()
        self.next_slot, self._unused_slots = values["turn"], set(values["unborn"])
        for slot, counts in values["lives"].items():
            own = {n.removeprefix(f"{slot}/"): v for n, v in tensors.items() if n.startswith(f"{slot}/")}
            strategy = self.phi[counts["phi"]]
            self.adversaries[int(slot)] = self._simulation(int(slot)).restored(strategy, task, own, counts)
