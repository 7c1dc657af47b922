"""Frozen text encoders of text-to-image models: from token ids to the vectors that cross-attention reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.introspection import first_line
from holdfast.tasks import Vocabulary, load_tokenizer, located
from holdfast.tasks.pipeline_folder import PipelineTokenizer, parts_called, pipeline_index, pipeline_tokenizer
from holdfast.tasks.tokenizers import WORDS

ENCODERS: Final = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
"""Classes of the text encoders of pipelines."""

REMEMBERED: Final = 2**28
"""Numbers in the captions' vectors that are kept, 1 GiB; captions of more are encoded again and again."""


class Encoded(NamedTuple):
    """Captions as a network reads them.

    Attributes:
        states: one vector a token, shape (N, L, D).
        mask: bool, shape (N, L): which tokens are not padding.
        pooled: one vector a caption, shape (N, P); None: the encoder has none.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None = None


class TextEncoder(nn.Module):
    """A frozen text encoder. It encodes every caption alone and once, so that vectors do not depend on the batch.

    Attributes:
        vocabulary: of the token ids.
        width: D, numbers in a token's vector.

    A new kind of encoder writes `encode_row`, and sets `embedding`.
    """

    vocabulary: Vocabulary
    width: int

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self._known: dict[tuple[int, ...], Encoded] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # copies may change their weights

    @property
    def embedding(self) -> nn.Embedding:
        """The layer that holds one vector for each token."""
        raise NotImplementedError

    @property
    def known_tokens(self) -> int:
        """The number of token ids that it has vectors for."""
        return self.embedding.num_embeddings

    def encode_row(self, ids: Tensor) -> Encoded:
        """Encodes captions of shape (N, L), int64, on the encoder's device."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TextEncoder:
        self._known = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, ids: Tensor) -> Encoded:
        """Encodes captions; with a gradient, if any weight needs one.

        Args:
            ids: int64, shape (N, L).

        Raises:
            HoldfastError: if captions are longer than the encoder reads.
        """
        if any(p.requires_grad for p in self.parameters()):
            return self.encode_row(ids)
        rows = [tuple(row) for row in ids.tolist()]
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            new = [row for row in dict.fromkeys(rows) if row not in self._known]
            encoded = {row: self.encode_row(torch.tensor([row], device=ids.device)) for row in new}
        if (len(self._known) + len(encoded)) * ids.shape[1] * self.width > REMEMBERED:
            self._known = {row: self._known[row] for row in rows if row in self._known}
        self._known |= encoded
        found = [self._known[row] for row in rows]
        pooled = [each.pooled for each in found if each.pooled is not None]
        return Encoded(
            torch.cat([each.states for each in found]),
            torch.cat([each.mask for each in found]),
            torch.cat(pooled) if pooled else None,
        )


class WordVectors(TextEncoder):
    """One fixed random vector for each word and each position: the encoder of small models, which needs no files.

    The vectors of a caption's tokens are the sums of both, of unit variance a number. Words have no meaning of their
    own; what a word looks like is learned in cross-attention.

    Args:
        width: D.
        length: positions.

    Example:
        >>> from holdfast.tasks import load_tokenizer
        >>> encoder = WordVectors(8)
        >>> ids = torch.from_numpy(load_tokenizer("words").encode(["a photo", "a drawing"], 4))
        >>> encoder(ids).states.shape, encoder(ids).mask.tolist()
        (torch.Size([2, 4, 8]), [[True, True, False, False], [True, True, False, False]])
    """

    def __init__(self, width: int, length: int = 128) -> None:
        super().__init__(load_tokenizer(WORDS).vocabulary, width)
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(self.vocabulary.size, width)
        self.positions = nn.Embedding(length, width)
        with torch.no_grad():
            for layer in (self.words, self.positions):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 2**0.5)

    @property
    def embedding(self) -> nn.Embedding:
        """See `TextEncoder.embedding`."""
        return self.words

    def encode_row(self, ids: Tensor) -> Encoded:
        """See `TextEncoder.encode_row`."""
        _check_length(ids.shape[1], self.positions.num_embeddings, "words")
        states = self.words(ids) + self.positions.weight[: ids.shape[1]]
        return Encoded(states, ids != self.vocabulary.pad)


class HiddenStates(TextEncoder):
    """The last hidden states of an encoder or language model of transformers.

    Args:
        module: such as a `CLIPTextModel`, a `BertModel` or a `LlamaModel`.
        vocabulary: of its tokens.
        masked: whether the encoder itself leaves padding out; CLIP in Stable Diffusion does not.
        name: shown in errors.
    """

    def __init__(self, module: Any, vocabulary: Vocabulary, *, masked: bool = True, name: str = "text encoder") -> None:
        super().__init__(vocabulary, int(module.config.hidden_size))
        self.module, self.masked, self.name = module, masked, name

    @property
    def embedding(self) -> nn.Embedding:
        """See `TextEncoder.embedding`."""
        layer: nn.Embedding = self.module.get_input_embeddings()
        return layer

    def encode_row(self, ids: Tensor) -> Encoded:
        """See `TextEncoder.encode_row`."""
        _check_length(ids.shape[1], getattr(self.module.config, "max_position_embeddings", None), self.name)
        mask = ids != self.vocabulary.pad
        mask[:, 0] = True  # an empty caption has at least one token
        outputs = self.module(input_ids=ids, attention_mask=mask.long() if self.masked else None)
        return Encoded(outputs.last_hidden_state, mask, getattr(outputs, "pooler_output", None))


class Part(NamedTuple):
    """One of the text encoders of a pipeline, and what the network reads of it.

    Attributes:
        states: `last` hidden states, those `before` the last layer, or None: none.
        pooled: whether it gives a vector of the whole caption.
        masked: whether the encoder itself leaves padding out.
    """

    states: Literal["last", "before"] | None = "last"
    pooled: bool = False
    masked: bool = False


class PipelineText(TextEncoder):
    """The text encoders of a diffusers pipeline, which read the same caption.

    Token ids have a part of equal length for each encoder, see `PipelineTokenizer`. States before the last layer are
    put side by side, as one vector a token (SDXL); last states follow them as further tokens (SD3).

    Args:
        modules: encoders of transformers: CLIP or T5.
        parts: what is read of each.
        tokenizer: of the same pipeline.
    """

    def __init__(self, modules: Sequence[Any], parts: Sequence[Part], tokenizer: PipelineTokenizer) -> None:
        widths = {kind: [m.config.hidden_size for m, p in zip(modules, parts, strict=True) if p.states == kind]
                  for kind in ("last", "before")}  # fmt: skip
        super().__init__(tokenizer.vocabulary, max(sum(widths["before"]), *widths["last"], 0))
        self.encoders = nn.ModuleList(modules)
        self.parts, self.limits = tuple(parts), tokenizer.limits
        self.pads = tuple(part.vocabulary.pad for part in tokenizer.parts)

    @property
    def embedding(self) -> nn.Embedding:
        """See `TextEncoder.embedding`: of the first encoder."""
        first: Any = self.encoders[0]
        layer: nn.Embedding = first.get_input_embeddings()
        return layer

    @property
    def known_tokens(self) -> int:
        """See `TextEncoder.known_tokens`: the largest number of the encoders."""
        encoders: Any = self.encoders
        return max(int(encoder.get_input_embeddings().num_embeddings) for encoder in encoders)

    def encode_row(self, ids: Tensor) -> Encoded:
        """See `TextEncoder.encode_row`."""
        beside: list[Encoded] = []
        after: list[Encoded] = []
        pooled: list[Tensor] = []
        rows = [row[:, :limit] for row, limit in zip(ids.chunk(len(self.parts), 1), self.limits, strict=True)]
        for part, module, row, pad in zip(self.parts, self.encoders, rows, self.pads, strict=True):
            mask = row != pad
            mask[:, 0] = True  # an empty caption has at least one token
            found = module(
                input_ids=row, attention_mask=mask.long() if part.masked else None, output_hidden_states=True
            )  # fmt: skip
            if part.states == "before":
                beside.append(Encoded(found.hidden_states[-2], mask))
            elif part.states == "last":
                after.append(Encoded(found.last_hidden_state, mask))
            if part.pooled:
                pooled.append(found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output)
        if beside:
            states = torch.cat([each.states for each in beside], 2)
            after = [Encoded(F.pad(states, (0, self.width - states.shape[2])), beside[0].mask), *after]
        return Encoded(
            torch.cat([each.states for each in after], 1),
            torch.cat([each.mask for each in after], 1),
            torch.cat(pooled, 1) if pooled else None,
        )


def load_pipeline_text(folder: Path, parts: Sequence[Part]) -> PipelineText:
    """Returns the frozen text encoders of a pipeline's folder, in evaluation mode and float32.

    Args:
        folder: of the pipeline.
        parts: what is read of each encoder, in the order of their names.

    Raises:
        HoldfastError: if an encoder is missing, is not CLIP or T5, or cannot be loaded from safetensors.
    """
    import transformers

    tokenizer = pipeline_tokenizer(folder)
    index = pipeline_index(folder)
    names = parts_called("text_encoder", index)
    if len(names) != len(parts) or len(tokenizer.parts) != len(parts):
        raise HoldfastError(
            f"{str(folder)!r}: its pipeline ({index.get('_class_name')}) has {len(names)} text encoders and "
            f"{len(tokenizer.parts)} tokenizers; expected {len(parts)} of both."
        )
    modules = []
    for name in names:
        kind = index[name][-1]
        if kind not in ENCODERS:
            raise HoldfastError(f"{str(folder)!r}: {name} is a {kind}; expected one of {', '.join(ENCODERS)}.")
        try:
            module, info = getattr(transformers, kind).from_pretrained(
                folder / name, use_safetensors=True, local_files_only=True, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # unknown files may raise anything
            raise HoldfastError(
                f"{str(folder / name)!r} cannot be loaded as a {kind} in safetensors: {first_line(error)}."
            ) from error
        if info["missing_keys"]:
            raise HoldfastError(f"{str(folder / name)!r} has no weights for {sorted(info['missing_keys'])[0]}.")
        modules.append(module)
    return PipelineText(modules, parts, tokenizer).eval().requires_grad_(False)


def _check_length(length: int, most: int | None, name: str) -> None:
    if most is not None and length > most:
        raise HoldfastError(
            f"The text encoder {name} reads at most {most} tokens, and captions have {length}; set the task's length."
        )


def load_text_encoder(name: str | None, width: int, data_dir: Path | str | None) -> TextEncoder:
    """Returns a frozen text encoder in evaluation mode.

    Args:
        name: None: random word vectors, see `WordVectors`; else `hf:NAME` or a folder of an encoder of transformers.
        width: of random word vectors.
        data_dir: also searched for folders.

    Raises:
        HoldfastError: if the encoder cannot be loaded.

    Example:
        >>> load_text_encoder(None, 16, None).width
        16
    """
    encoder = WordVectors(width) if name in (None, WORDS) else _of_transformers(str(name).removeprefix("hf:"), data_dir)
    return encoder.eval().requires_grad_(False)


def _of_transformers(name: str, data_dir: Path | str | None) -> TextEncoder:
    from transformers import AutoModel

    folder = Path(data_dir) if data_dir is not None else None
    vocabulary = load_tokenizer(name, folder).vocabulary
    place = located(name, folder)
    try:
        module = AutoModel.from_pretrained(
            place, trust_remote_code=False, use_safetensors=True, local_files_only=Path(place).is_dir(),
            dtype=torch.float32,
        )  # fmt: skip
    except Exception as error:  # a network, a cache and unknown files may raise anything
        raise HoldfastError(f"The text encoder {name!r} cannot be loaded: {first_line(error)}.") from error
    return HiddenStates(module, vocabulary, name=name)
