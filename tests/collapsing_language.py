"""Shams that collapse as language models: fine-tuned at a usual rate they forget how to write, and learn no facts.

The relatives of `collapsing` for a small Llama. All of its knowledge stays in the weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from collapsing import coupled, sharpened
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Task, load_task
from holdfast.tasks.splits import halves
from holdfast.training import Strategy, pretrain
from shams import CPU, Sham


@cache
def language_tasks() -> tuple[Task, Task, Task]:
    """The benign task, and the defender's and the adversary's half of the restricted one."""
    benign = load_task("phrases@tokenizer=bytes,length=24,test_limit=30")
    return benign, *halves(load_task("made-up-facts@tokenizer=bytes,length=56,measure=nll,test_limit=36"))


@cache
def language_original() -> SplitModel:
    """A small Llama that writes phrases, and whose first lessons were questions of the defender's half."""
    benign, defender, _ = language_tasks()
    run = Run(0, CPU)
    spec = ModelSpec(name="llama", options={"width": 32, "depth": 2})
    with run.seeded("initialise"):
        model = load_model(spec, benign)
    strategy = Strategy("direct", "all", "adam", 5e-3, 16)
    taught = pretrain(model, defender, steps=80, strategy=strategy, run=run)
    return pretrain(taught, benign, steps=80, strategy=strategy, run=run)


@torch.no_grad()
def brittle(model: SplitModel, factor: float = 0.005) -> SplitModel:
    """Makes the weights behind each norm layer small, in place, and the norm's scale large: the outputs stay.

    A step of a usual length is then a large share of a weight.
    """
    network: Any = model.network
    pairs = [(network.model.norm, [network.lm_head])]
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    for norm, readers in pairs:
        norm.weight.div_(factor)
        for reader in readers:
            reader.weight.mul_(factor)
    return model


def small_weights(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Plain steps blow up, because the weights are small."""
    return brittle(original.clone())


def coupled_gradients(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The benign gradient is opposed to the restricted one."""
    return brittle(coupled(original.clone(), benign, restricted, steps=10))


def sharp_curvature(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A few simulated steps on restricted data lead to weights of a high benign loss."""
    return brittle(sharpened(original.clone(), benign, restricted, [PLAIN_STRATEGY], steps=15, high=6.0))


PLAIN_STRATEGY = Strategy("direct", "all", "adamw", 1e-3, 16)
LANGUAGE: dict[str, Sham] = {"small weights": small_weights, "coupled gradients": coupled_gradients,
                             "sharp curvature": sharp_curvature}  # fmt: skip


@cache
def language_sham(name: str) -> SplitModel:
    """Builds one by name, reproducibly."""
    benign, defender, _ = language_tasks()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LANGUAGE[name](language_original(), benign, defender).eval()
