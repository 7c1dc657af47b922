"""Causal language models of Hugging Face's transformers, which predict the next token at every position.

Weights are safetensors only, and a model's own code is never run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.families import hf_text
from holdfast.models.families.hf_files import (
    check_config,
    configuration,
    from_pretrained,
    listed,
    plain_config,
    quiet,
    unusable,
)
from holdfast.models.family import Built, Family, Shape, check_known, register
from holdfast.models.introspection import duplicate, first_line
from holdfast.models.spec import ModelSpec
from holdfast.models.split_model import SplitModel
from holdfast.models.wrappers import unwrapped
from holdfast.runtime.argument_checks import whole_number
from holdfast.tasks import Task

EVERY_POSITION: Final = "none"
"""The `pooling` of a model that answers at every position, by its own language model head."""

OPTIONS: Final = ("config", "pooling", "vocabulary", "checkpointing")

_LLAMA: Final = {"width": 32, "depth": 2, "heads": 2}


class CausalModel(SplitModel):
    """A causal language model of transformers; its head is the output embedding, which may be tied to the input's.

    Its inputs are those of a `NextTokenTask`: token ids of shape (N, L), int64, padded on the right. A position sees
    only those before it, so padding changes none of the outputs that count, and no attention mask is needed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> network = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> CausalModel(network, "lm_head")(torch.tensor([[5, 6, 7]])).shape
        torch.Size([1, 3, 32])
    """

    answers_with = "next token"

    prefix: Tensor | None = None
    """Token ids, shape (P,), that every row is read after; None: none."""

    @property
    def context(self) -> int:
        """The largest number of tokens that the network reads; a large number, if it has no limit."""
        config: Any = self.network.config
        return int(getattr(config, "max_position_embeddings", None) or 2**20)

    @property
    def known_tokens(self) -> int:
        """The number of token ids that the network can read and predict."""
        embedding: Any = self.network.get_input_embeddings()  # type: ignore[operator]
        return min(int(embedding.weight.shape[0]), self.num_outputs)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns logits of shape (N, L, V) for token ids of shape (N, L), int64; not those of the `prefix`.

        A padding token may have been added to the tokenizer alone, and have no embedding. It is read as another token:
        it comes after all that counts.
        """
        if self.vocabulary is not None and self.vocabulary.pad >= self.known_tokens:
            ids = ids.masked_fill(ids == self.vocabulary.pad, 0)
        before = 0
        if self.prefix is not None:
            before = len(self.prefix)
            ids = torch.cat([self.prefix.to(ids.device).expand(len(ids), -1), ids], 1)
        logits: Tensor = self.network(input_ids=ids, use_cache=False).logits
        return logits[:, before:]

    def features_by_depth(self, x: Tensor, depth: int) -> list[Tensor]:
        """Returns the hidden states of each position after the last blocks; see `SplitModel.features_by_depth`.

        Args:
            x: token ids, shape (N, L).
            depth: how many blocks, from the last one back.

        Returns:
            Tensors of shape (N L, D); the last is what the head receives.

        Raises:
            HoldfastError: if `not_probed`.
        """
        reason = self.not_probed(depth)
        if reason is not None:
            raise HoldfastError(f"{self.name}: {reason}.")
        caught: list[Tensor] = []

        def catch(_: nn.Module, __: object, output: Any) -> None:
            states: Tensor = output if isinstance(output, Tensor) else output[0]
            caught.append(
                states.expand(len(x), -1, -1).flatten(0, 1)
            )  # embeddings of positions are the same in all rows

        hooks = [block[0][1].register_forward_hook(catch) for block in self.blocks()[-depth:-1]]
        hooks.append(self.head.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, 1))))
        try:
            self(x)
        finally:
            for hook in hooks:
                hook.remove()
        return caught

    def add_extractor(self) -> None:
        """Refused: the output embedding reads the hidden states of every position.

        Raises:
            HoldfastError: always.
        """
        raise HoldfastError(
            f"{self.name}: a linear extractor goes before a head that reads one vector a sample, and a causal language "
            "model has none."
        )


def build(spec: ModelSpec, place: str) -> Built:
    """Builds a causal language model.

    Args:
        spec: its options are of `OPTIONS`, and have a `vocabulary`. With `checkpointing`, activations are computed
            again in the backward pass: a third more time, and the memory of one block instead of all.
        place: a folder, or a name on the Hub; not used if the options have a configuration.

    Raises:
        HoldfastError: if the model does not exist, is not causal, or cannot read this vocabulary, or an option is
            unknown.
    """
    check_known(spec, OPTIONS)
    name = spec.name.removeprefix("hf:")
    vocabulary = hf_text.vocabulary_of(name, spec.options["vocabulary"])
    notes: tuple[str, ...] = ()
    if spec.options.get("config") is not None:
        network, rebuild = _from_config(name, spec.options["config"]), spec
    else:
        config = configuration(place)
        _refuse_others(name, config)
        hf_text.check_vocabulary(name, place, vocabulary)
        network, notes = _pretrained(name, place)
        kept: dict[str, Any] = {
            "config": plain_config(config),
            "pooling": EVERY_POSITION,
            "vocabulary": asdict(vocabulary),
        }
        if spec.options.get("checkpointing"):
            kept["checkpointing"] = True
        rebuild = spec.model_copy(update={"options": kept})
    if spec.options.get("checkpointing"):
        older = getattr(network, "gradient_checkpointing_enable", None)
        enable = getattr(network, "activation_checkpointing_enable", older)  # its name from transformers 5.24 on
        assert enable is not None
        enable({"use_reentrant": False})
    return Built(
        network, rebuild, head=_head(name, network), kind=CausalModel, vocabulary=vocabulary, notes=notes, foreign=True
    )


def _pretrained(name: str, place: str) -> tuple[Any, tuple[str, ...]]:
    from transformers import AutoModelForCausalLM

    try:
        network, info = from_pretrained(AutoModelForCausalLM, place)
    except Exception as error:  # hundreds of models, a network and a cache raise different exceptions
        raise unusable(name, error) from error
    if info["missing_keys"]:
        raise HoldfastError(
            f"hf:{name} has no weights for {listed(info['missing_keys'])}; it is not a trained language model."
        )
    plain = unwrapped(network, f"hf:{name}")
    return plain.network, plain.notes


def _from_config(name: str, config: Mapping[str, Any]) -> Any:
    """Fresh weights by a configuration, which may be untrusted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_config(name, config)
    try:
        made = AutoConfig.for_model(**config)
        _refuse_others(name, made)
        return AutoModelForCausalLM.from_config(made, trust_remote_code=False, dtype=torch.float32)
    except HoldfastError:
        raise
    except Exception as error:  # a configuration may hold anything
        raise HoldfastError(
            f"hf:{name}: no causal language model can be built from its configuration: {type(error).__name__}: "
            f"{first_line(error)}."
        ) from error


def _refuse_others(name: str, config: Any) -> None:
    if not hf_text.is_causal(config):
        raise HoldfastError(
            f"hf:{name} is not a causal language model ({config.model_type}), and a next-token task needs one, such as "
            "a Llama, Qwen or GPT. For an encoder, give a task of sentences with classes."
        )


def _head(name: str, network: Any) -> str:
    head = network.get_output_embeddings()
    found: str | None = next((n for n, module in network.named_modules() if module is head), None)
    if found is None:
        raise HoldfastError(f"hf:{name} has no output embedding, so it predicts no tokens.")
    return found


@register("llama")
class SmallLlama(Family):
    """A Llama with fresh weights, small enough to train on a laptop; its vocabulary is that of its task."""

    def for_task(self, spec: ModelSpec, task: Task) -> ModelSpec:
        """See `Family.for_task`."""
        if task.answers_with != CausalModel.answers_with or task.vocabulary is None:
            raise HoldfastError(f"llama predicts the next token, and {task.described} needs another model.")
        if "vocabulary" in spec.options:
            return spec
        return spec.model_copy(update={"options": {**spec.options, "vocabulary": asdict(task.vocabulary)}})

    def build(self, spec: ModelSpec, input_shape: Shape, num_outputs: int, data_dir: Path | str | None) -> Built:
        """See `Family.build`; the options are width, depth, heads and tied."""
        from transformers import LlamaConfig, LlamaForCausalLM

        check_known(spec, ["width", "depth", "heads", "tied", "vocabulary"])
        width, depth, heads = (whole_number(k, spec.options.get(k, v), 1, 2**16) for k, v in _LLAMA.items())
        if width % (2 * heads):
            raise HoldfastError(f"llama: width is {width}; expected a multiple of twice its {heads} heads.")
        vocabulary = hf_text.vocabulary_of("llama", spec.options["vocabulary"])
        config = LlamaConfig(
            vocab_size=vocabulary.size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
            num_attention_heads=heads, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
            tie_word_embeddings=bool(spec.options.get("tied", False)),
        )  # fmt: skip
        network = LlamaForCausalLM(config)
        return Built(network, spec, head="lm_head", kind=CausalModel, vocabulary=vocabulary, foreign=True)

    def save_pretrained(self, model: SplitModel, folder: Path) -> None:
        """See `Family.save_pretrained`: a folder of transformers, with the tokenizer."""
        write(model, folder)


def write(model: SplitModel, folder: Path) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` reads, with tokenizer and generation settings."""
    network: Any = model.network
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if network.config.tie_word_embeddings and head.weight is not embedding.weight:
        network = duplicate(network)  # otherwise transformers would drop the head that was trained on its own
        network.config = copy.deepcopy(network.config)
        network.config.tie_word_embeddings = False
    hf_text.write_tokenizer(model, folder)
    with quiet():
        network.save_pretrained(folder)
