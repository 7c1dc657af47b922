"""Tiny language models and a tokenizer for tests, made as people would save them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16,
        "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
WORDS = ["good", "bad", "film", "book", "a", "was", "the", "very", "so", "not", "and", "is", "story", "plot", "nice",
         "ugly"]  # fmt: skip


def save_tokenizer(folder: Path, *, pad: str | None = "[PAD]", words: list[str] | None = None) -> None:
    """A fast tokenizer that cuts at blanks; without a padding token, its end token is to fill up."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[END]", "[UNK]", *(words or WORDS)])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    more = {"pad_token": pad} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token="[END]", **more).save_pretrained(
        folder
    )


def save_model(folder: Path, config: dict[str, object], kind: str = "AutoModel", **more: object) -> None:
    """A language model with fresh weights, as `save_pretrained` writes it, and its tokenizer."""
    import transformers

    made = transformers.AutoConfig.for_model(**{**config, **more})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        getattr(transformers, kind).from_config(made).save_pretrained(folder)
    save_tokenizer(folder, pad=None if config["model_type"] == "gpt2" else "[PAD]")


def write_reviews(folder: Path, count: int = 40) -> Path:
    """A table of two kinds of sentences, with a column that fixes the split."""
    rows = ["split,label,review"]
    for i in range(count):
        good, split = i % 2 == 0, "test" if i % 4 > 1 else "train"
        thing, extra = ("film", "book", "story", "plot")[i // 2 % 4], ("very", "so", "not", "and", "is")[i % 5]
        rows.append(
            f"{split},{'pos' if good else 'neg'},the {thing} {extra} was {'good nice' if good else 'bad ugly'} {i}"
        )
    path = folder / "reviews.csv"
    path.write_text("\n".join(rows))
    return path


def described(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))
