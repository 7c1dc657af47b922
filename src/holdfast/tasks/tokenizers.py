"""Tokenizers turn sentences into rows of integers; a `Vocabulary` identifies one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import HoldfastError
from holdfast.tasks.paths import place

PACKAGE = "package:"
WORDS = "words"
BYTES = "bytes"
GGUF = ".gguf"
"""Ending of the files of llama.cpp, with weights, configuration and tokenizer in one; transformers dequantises them."""
_BUCKETS = 1024


@dataclass(frozen=True)
class Vocabulary:
    """Identifies the meaning of token ids, so that a model's and a task's can be compared.

    Attributes:
        name: of the tokenizer, as given; for a folder, its last part.
        size: number of tokens; ids are below it.
        pad: the padding id.
        sha256: over all tokens with their ids.
    """

    name: str
    size: int
    pad: int
    sha256: str

    def agrees(self, other: Vocabulary) -> bool:
        """Returns whether ids mean the same in both, whatever the tokenizers' names."""
        return (self.sha256, self.pad) == (other.sha256, other.pad)


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        vocabulary: identifies its tokens.
        fast: one of transformers' fast tokenizers; None: words are hashed, see `load_tokenizer`.
        length: tokens a caption, if the model that it belongs to has a usual number.
    """

    vocabulary: Vocabulary
    fast: Any = field(default=None, repr=False, compare=False)
    length: int | None = None

    def encode(self, texts: Sequence[str], length: int) -> npt.NDArray[np.int64]:
        """Returns token ids, truncated and padded on the right to one length.

        Args:
            texts: N sentences.
            length: tokens a sentence, including those that the tokenizer adds.

        Returns:
            Ids of shape (N, length), int64.

        Raises:
            HoldfastError: if the tokenizer adds more tokens than `length`.

        Example:
            >>> load_tokenizer("words").encode(["Hold fast!", ""], 4)
            array([[219,  13, 500,   0],
                   [  0,   0,   0,   0]])
        """
        rows = self._cut(list(texts), length)
        ids = np.full((len(rows), length), self.vocabulary.pad, dtype=np.int64)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = row
        return ids

    def _cut(self, texts: list[str], length: int) -> list[list[int]]:
        if self.fast is None:
            return [[_bucket(word) for word in re.findall(r"\w+|[^\w\s]", text.lower())[:length]] for text in texts]
        added = self.fast.num_special_tokens_to_add()
        if length <= added:
            raise HoldfastError(
                f"length is {length}, and the tokenizer {self.vocabulary.name!r} adds {added} tokens of its own; "
                f"expected at least {added + 1}."
            )
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        encoded = self.fast(texts, truncation=True, max_length=length, padding=False, **options)
        return [list(row) for row in encoded["input_ids"]]


@lru_cache(maxsize=8)
def load_tokenizer(name: str, data_dir: Path | None = None) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        name: a folder with `tokenizer.json`, of a text-to-image pipeline of diffusers or a `.gguf` file, here or in the
            data folder; `package:NAME/FOLDER`, a folder (or file) inside an installed package; a name on the Hub (which
            needs a network, or its cache); or `words`, which hashes words and punctuation into 1,023 numbers, or
            `bytes`, whose tokens are the bytes of UTF-8. The last two need no files, and suit models that are trained
            from scratch; with `bytes` text can be written as well.
        data_dir: the data folder.

    Raises:
        HoldfastError: if it does not exist, is not a fast tokenizer, or has no padding token.

    Example:
        >>> load_tokenizer("words").vocabulary.size
        1024
    """
    if name == WORDS:
        digest = hashlib.sha256(f"{WORDS}, BLAKE2b, {_BUCKETS}".encode()).hexdigest()
        return Tokenizer(Vocabulary(WORDS, _BUCKETS, 0, digest))
    if name == BYTES:
        return _of_bytes()
    from transformers import AutoTokenizer

    source = located(name, data_dir)
    if (Path(source) / "model_index.json").is_file():
        from holdfast.tasks.pipeline_folder import pipeline_tokenizer  # which imports this module

        return pipeline_tokenizer(Path(source))
    place, more = transformers_place(source)
    folder = Path(place).is_dir()
    try:
        fast = AutoTokenizer.from_pretrained(
            place, use_fast=True, trust_remote_code=False, local_files_only=folder, **more
        )
    except Exception as error:  # a network, a cache and many file formats raise different exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        hint = (
            "Expected a folder with tokenizer.json, as save_pretrained writes it."
            if folder
            else f"There is no folder {name!r} here, and fetching it from the Hub needs a network (or its cache). Give "
            "its folder as the task's `tokenizer`."
        )
        raise HoldfastError(f"The tokenizer {name!r} cannot be loaded: {reason}. {hint}") from error
    if not getattr(fast, "is_fast", False):
        raise HoldfastError(f"The tokenizer {name!r} is not a fast one; expected a folder with tokenizer.json.")
    pad = fast.pad_token_id if fast.pad_token_id is not None else fast.eos_token_id
    if pad is None:
        raise HoldfastError(
            f"The tokenizer {name!r} has neither a padding nor an end token for padding sentences; set its pad_token "
            "and save it."
        )
    tokens = json.dumps(sorted(fast.get_vocab().items()), ensure_ascii=True)
    label = name if name.startswith(PACKAGE) or not folder else Path(source).name
    return Tokenizer(Vocabulary(label, len(fast), int(pad), hashlib.sha256(tokens.encode()).hexdigest()), fast)


@lru_cache(maxsize=1)
def _of_bytes() -> Tokenizer:
    """A tokenizer of transformers whose tokens are the 256 bytes, an end token and a padding token."""
    from tokenizers import Tokenizer as Plain
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Plain(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<end>", eos_token="<end>", pad_token="<pad>", model_max_length=2**20
    )
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    return Tokenizer(Vocabulary(BYTES, len(tokens), 0, digest), fast)


def located(name: str, data_dir: Path | str | None = None) -> str:
    """Returns the path of a folder (or `.gguf` file) in a package, here, or in the data folder; else the name itself.

    The package is not imported, and its code is not run.

    Raises:
        HoldfastError: if a package or the folder in it does not exist, or there are two such folders.

    Example:
        >>> located("package:sklearn/datasets/data").endswith("sklearn/datasets/data")
        True
    """
    if name.startswith(PACKAGE):
        return str(_in_package(name.removeprefix(PACKAGE)))
    folder = place(name, data_dir, is_there=Path.is_file if name.endswith(GGUF) else Path.is_dir)
    return name if folder is None else str(folder)


def transformers_place(source: str) -> tuple[str, dict[str, str]]:
    """Returns the first argument of `from_pretrained`, and more that it needs, for a folder, a name or a `.gguf` file.

    Example:
        >>> transformers_place("models/small.Q4_1.gguf")
        ('models', {'gguf_file': 'small.Q4_1.gguf'})
    """
    if not source.endswith(GGUF):
        return source, {}
    path = Path(source).expanduser()
    return str(path.parent), {"gguf_file": path.name}


def _in_package(name: str) -> Path:
    package, _, inner = name.partition("/")
    if not package.isidentifier():  # finding `a.b` would import a
        raise HoldfastError(f"package:{name}: {package!r} is not a top-level package; write package:NAME/FOLDER.")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HoldfastError(
            f"package:{name}: no package {package!r} is installed; pip install {package.replace('_', '-')}, or name a "
            "folder."
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / inner
    there = folder.is_file() if inner.endswith(GGUF) else folder.is_dir()
    if ".." in Path(inner).parts or not there:
        raise HoldfastError(f"package:{name}: the package {package!r} has no folder {inner!r}.")
    return folder


@lru_cache(maxsize=100_000)  # a few words make up most of any text
def _bucket(word: str) -> int:
    """An id from 1 on: 0 is the padding."""
    return 1 + int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest()) % (_BUCKETS - 1)
