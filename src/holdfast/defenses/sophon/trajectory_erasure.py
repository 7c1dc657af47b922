"""Trajectory erasure: SOPHON's simulation, with losses that remove information instead of changing the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdfast.defenses.registry import register_defense
from holdfast.defenses.sophon.sophon import Sophon
from holdfast.tasks import Task


@register_defense
@dataclass
class TrajectoryErasure(Sophon):
    """SOPHON's Algorithm 1 with other losses and adversaries; see docs/trajectory-erasure.md.

    - KLU (Eq. 13) in place of ICE: outputs should contain no information. ICE moves the predicted class, and a new head
      reads the moved class as well as the right one.
    - Ridge probes at the end of each simulation: no head at all should read the labels from the features.
    - Strong adversaries, whose steps of 1e-2 undo weak suppression.
    - A large suppression step. If it costs too much, reinforcement loops recover the benign score.
    - For denoisers DoS (Eq. 16) stands for KLU, a probe reads the noise of each pixel, and the model's outputs on the
      states that it passes while it draws images are kept (`sampling`).

    The settings are those of `Sophon` with other defaults, chosen on `mnist[0-4]` to `mnist[5-9]`.

    Example:
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[0-4]")
        >>> TrajectoryErasure().resolved(task).loss, Sophon().resolved(task).loss
        ('klu', 'ice')
    """

    name: ClassVar[str] = "trajectory-erasure"
    citation: ClassVar[str] = "Holdfast, docs/trajectory-erasure.md"
    title: ClassVar[str] = "trajectory erasure"
    sampling_default: ClassVar[float] = 1.0

    steps: int = 20
    optimizers: tuple[str, ...] = ("adam", "adagrad")
    learning_rates: tuple[float, ...] = (1e-3, 1e-2)
    batch_sizes: tuple[int, ...] = (50,)
    suppression_lr: float = 3e-3
    probe_weight: float = 2.0
    reinforcement_loops: int = 2
    recovery_loops: int = 40
    max_benign_drop: float = 0.03

    def preferred_loss(self, benign: Task) -> str:
        """See `Sophon.preferred_loss`: KLU where the task has classes, and the task's own loss elsewhere."""
        return "klu" if "klu" in benign.suppression_losses else super().preferred_loss(benign)
