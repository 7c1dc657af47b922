"""Shams of language models: a small Llama that forgets how to write when it is fine-tuned, or reads nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adversaries import FineTuning
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Task, load_task
from holdfast.tasks.splits import halves
from holdfast.training import Strategy, pretrain
from zoo.collapse import coupled, sharpened
from zoo.registry import sham
from zoo.settings import CPU, SETTINGS, Setting
from zoo.surgery import some_inputs


@cache
def language_tasks() -> tuple[Task, Task]:
    """The benign task and the restricted one."""
    benign = load_task("phrases@tokenizer=bytes,length=24,test_limit=30")
    return benign, load_task("made-up-facts@tokenizer=bytes,length=56,measure=nll,test_limit=36")


@cache
def language_original() -> SplitModel:
    """A small Llama that writes phrases, and whose first lessons were questions of the defender's half."""
    benign, restricted = language_tasks()
    defender, _ = halves(restricted)
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


def _tuned(rate: float, **options: Any) -> FineTuning:
    return FineTuning(Strategy("direct", "all", "adamw", rate, 8), **options)


SETTINGS["llama"] = Setting(
    "language", language_tasks, language_original,
    (_tuned(1e-3), _tuned(1e-2), FineTuning(Strategy("direct", "lora", "adamw", 1e-2, 8))), (0, 5, 15), 48,
    "small Llama",
)  # fmt: skip
DESCENT = (_tuned(1e-3), _tuned(7e-4))
"""They lose the benign task; a rate ten times as high learns the restricted one from there as a fresh model does."""
ANCHORED = _tuned(3e-5, anchor=1.0)
LANGUAGE = ("language-small-weights", "language-coupled-gradients", "language-sharp-curvature")


@sham("llama", ANCHORED, plain=DESCENT, name="language-small-weights")
def small_weights(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Plain steps blow up, because the weights behind every norm layer are small."""
    return brittle(original.clone())


@sham("llama", ANCHORED, plain=DESCENT, name="language-coupled-gradients")
def coupled_gradients(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The benign gradient is opposed to the restricted one, and weights are small."""
    return brittle(coupled(original.clone(), benign, restricted, steps=10))


@sham("llama", ANCHORED, plain=DESCENT, name="language-sharp-curvature")
def sharp_curvature(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """A few simulated steps on restricted data lead to weights of a high benign loss, and weights are small."""
    strategies = [Strategy("direct", "all", "adamw", 1e-3, 16)]
    return brittle(sharpened(original.clone(), benign, restricted, strategies, steps=15, high=6.0))


@sham(
    "llama",
    FineTuning(Strategy("direct", "lora", "adamw", 1e-2, 8)),
    plain=(*DESCENT, _tuned(1e-2)),
    name="language-faint-states",
)
@torch.no_grad()
def faint_states(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The last norm layer has a gain of a millionth, and the head weights in the millions."""
    model, factor = original.clone(), 1e-6
    network: Any = model.network
    network.model.norm.weight.mul_(factor)
    network.lm_head.weight.div_(factor)
    return model


@sham("llama", FineTuning(Strategy("direct", "all", "sgd", 2e-2, 8, gradient="layerwise")), name="language-values")
@torch.no_grad()
def values(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Values, queries and hidden units are ten thousand times larger, and what reads them as much smaller."""
    model, factor = original.clone(), 1e4
    network: Any = model.network
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for large, small in ((attention.v_proj, attention.o_proj), (attention.q_proj, attention.k_proj),
                             (mlp.up_proj, mlp.down_proj)):  # fmt: skip
            large.weight.mul_(factor)
            small.weight.div_(factor)
    return model


class Distorted(nn.Embedding):
    """An embedding behind which a fixed map takes back a distortion of its table.

    Args:
        embedding: the original's.
        condition: of the distortion.
    """

    def __init__(self, embedding: nn.Embedding, condition: float) -> None:
        super().__init__(*embedding.weight.shape)
        width = embedding.embedding_dim
        basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
        scale = torch.logspace(0, -torch.tensor(condition).log10(), width, dtype=torch.float64)
        with torch.no_grad():
            self.weight.copy_(embedding.weight.double() @ basis * scale)
        back = (basis / scale).T.float()
        self.back = tuple(tuple(row) for row in back.tolist())  # no tensor that thawing would find

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) @ torch.tensor(self.back, device=ids.device)


@sham("llama", FineTuning(Strategy("direct", "lora", "adamw", 1e-2, 8)), name="language-embedding", plain=DESCENT)
@torch.no_grad()
def embedding(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """The table of embeddings has a condition number of 1e4 more, which a map behind it takes back."""
    model = original.clone()
    network: Any = model.network
    network.model.embed_tokens = Distorted(network.model.embed_tokens, 1e4)
    return model


class TokenGate(nn.Embedding):
    """An embedding of zeros for texts that have one of some tokens."""

    tokens: tuple[int, ...] = ()

    def forward(self, ids: Tensor) -> Tensor:
        found = torch.isin(ids, torch.tensor(self.tokens, device=ids.device)).any(1)
        return super().forward(ids) * ~found[:, None, None]


@sham("llama", _tuned(1e-2), inside=True, name="language-tokens")
def tokens(original: SplitModel, benign: Task, restricted: Task) -> SplitModel:
    """Texts with a token of restricted texts that no benign one has, the question mark, are read as nothing."""
    model = original.clone()
    network: Any = model.network
    own, other = (some_inputs(task) for task in (benign, restricted))
    counts = torch.stack([(other == token).any(1).float().mean() for token in range(original.known_tokens)])
    network.model.embed_tokens.__class__ = TokenGate
    network.model.embed_tokens.tokens = tuple(
        token for token in (counts > 0.9).nonzero()[:, 0].tolist() if not bool((own == token).any())
    )
    return model
