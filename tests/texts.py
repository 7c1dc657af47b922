"""Tiny models of transformers and a tokenizer for tests, saved as `save_pretrained` does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from holdfast.models import load_task_for
from holdfast.tasks import Task

BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16,
        "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1,
         "tie_word_embeddings": True}  # fmt: skip
"""A causal model with tied embeddings, which are larger than the vocabulary of `save_tokenizer`."""

CHAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' [END] ' }}{% endfor %}" \
       "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"  # fmt: skip
MODELS = {
    "bert": (BERT, "AutoModel"),
    "gpt2": (GPT2, "AutoModelForCausalLM"),
    "bert-classifier": (BERT, "AutoModelForSequenceClassification"),
    "gpt2-classifier": ({**GPT2, "pad_token_id": 1}, "AutoModelForSequenceClassification"),
}
WORDS = ["good", "bad", "film", "book", "a", "was", "the", "very", "so", "not", "and", "is", "story", "plot", "nice",
         "ugly"]  # fmt: skip


def save_tokenizer(folder: Path, *, pad: str | None = "[PAD]", words: list[str] | None = None) -> None:
    """A fast tokenizer that splits at blanks; without a padding token, its end token pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[END]", "[UNK]", *(words or WORDS)])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    more = {"pad_token": pad} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token="[END]", **more).save_pretrained(
        folder
    )


def save_model(folder: Path, config: dict[str, object], kind: str = "AutoModel") -> None:
    """A language model with fresh weights, and its tokenizer."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(**config))
        model.save_pretrained(folder)
    save_tokenizer(folder, pad=None if config["model_type"] == "gpt2" else "[PAD]")


def save_models(root: Path) -> Path:
    """A folder for each of `MODELS`, and a table of reviews."""
    for name, (config, kind) in MODELS.items():
        save_model(root / name, config, kind)
    write_reviews(root)
    return root


def reviews(root: Path, model: str = "bert", length: int = 8) -> Task:
    """The table that `save_models` wrote, as one of its models reads it."""
    table = f"{root / 'reviews.csv'}@text=review,target=label,length={length}"
    return load_task_for(table, f"hf:{root / model}")


def tiny_vit(**labels: object) -> nn.Module:
    """An image classifier for grey images of 8 pixels, with fresh weights."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, **labels,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(config).eval()


def write_reviews(folder: Path, count: int = 40) -> Path:
    """A table of two kinds of sentences, with a column `split`."""
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


def save_causal(folder: Path, *, chat: bool = False, **config: object) -> str:
    """A causal language model with fresh weights, its tokenizer and generation settings; returns its name."""
    save_model(folder, {**LLAMA, **config}, "AutoModelForCausalLM")
    if chat:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))
    return f"hf:{folder}"


def write_text(path: Path, sentences: int = 120, seed: int = 0) -> Path:
    """A text of made-up sentences over `WORDS`, in which each word has few followers."""
    generator = torch.Generator().manual_seed(seed)
    words = [WORDS[0]]
    for _ in range(8 * sentences):
        step = int(torch.randint(1, 4, (1,), generator=generator))
        words.append(WORDS[(WORDS.index(words[-1]) + step + seed) % len(WORDS)])
    path.write_text(" ".join(words))
    return path


def write_rows(path: Path, rows: list[object]) -> Path:
    """A file of one JSON object a line."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def described(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))
