"""Frozen text encoders of text-to-image models: from token ids to the vectors that cross-attention reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.introspection import first_line
from holdfast.tasks import Vocabulary, load_tokenizer, located
from holdfast.tasks.tokenizers import WORDS

REMEMBERED: Final = 4096
"""Captions whose vectors are kept; a data set of more is encoded again and again."""


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
        if len(self._known) + len(encoded) > REMEMBERED:
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
