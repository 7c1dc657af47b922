"""Language models of Hugging Face's transformers as classifiers of token ids: encoders and causal models, pooled.

A sequence classifier keeps its own head. Any other encoder, and any causal model, becomes a `Pooled`: its last hidden
states are pooled to one vector a sentence, which a linear head reads. Weights are safetensors only, and a model's own
code is never run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models import wrappers
from holdfast.models.families import hf_vision
from holdfast.models.families.hf_files import (
    check_config,
    configuration,
    from_pretrained,
    listed,
    plain_config,
    unusable,
)
from holdfast.models.family import Built, check_known
from holdfast.models.introspection import first_line, logits_of
from holdfast.models.spec import ModelSpec
from holdfast.models.split_model import SplitModel
from holdfast.runtime.storage import load_tensors, save_tensors, write_atomic
from holdfast.tasks import Vocabulary, load_tokenizer
from holdfast.tasks.tokenizers import GGUF

OWN = "own"
POOLINGS: Final = ("mean", "cls", "last", OWN)
"""How hidden states become one vector: their mean, the first, the last, or by the model's own classifier."""

OPTIONS: Final = ("config", "pooling", "num_labels", "vocabulary")


class Pooled(nn.Module):
    """An encoder, pooling over all positions except padding, and a linear head.

    Args:
        body: maps `input_ids` and `attention_mask` to an object with `last_hidden_state`, shape (N, L, width).
        width: of the hidden states.
        num_outputs: of the head, which is freshly initialised from torch's global generator.
        pooling: `mean`, `cls` (the first position) or `last`.
        pad: the padding id.

    Attributes:
        cuts: whether a batch is cut to its longest sentence; if not, hidden states of all batches have one shape.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> body = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
        >>> network = Pooled(body, 8, 3, pooling="mean", pad=0)
        >>> short, long = network(torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8]]))
        >>> torch.allclose(short, network(torch.tensor([[5, 6]]))[0], atol=1e-5)  # padding has no effect
        True
    """

    def __init__(self, body: nn.Module, width: int, num_outputs: int, *, pooling: str, pad: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, num_outputs)
        self.pooling = pooling
        self.pad = pad
        self.cuts = True

    def forward(self, ids: Tensor) -> Tensor:
        """Returns logits of shape (N, num_outputs) for token ids of shape (N, L), int64."""
        ids, mask = _read(ids, self.pad, self.cuts)
        hidden = self.body(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        logits: Tensor = self.head(self._pooled(hidden, mask))
        return logits

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            return hidden[:, 0]
        counts = mask.sum(1, keepdim=True)
        if self.pooling == "mean":
            return (hidden * mask[..., None].to(hidden.dtype)).sum(1) / counts.to(hidden.dtype)
        last = (counts - 1)[..., None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, last)[:, 0]


class Masked(nn.Module):
    """A sequence classifier of transformers that computes its attention mask from the token ids.

    Args:
        model: maps `input_ids` and `attention_mask` to an object with `logits`.
        pad: the padding id.

    Attributes:
        cuts: see `Pooled`.
    """

    def __init__(self, model: nn.Module, pad: int) -> None:
        super().__init__()
        self.model = model
        self.pad = pad
        self.cuts = True

    def forward(self, ids: Tensor) -> Tensor:
        """Returns logits of shape (N, classes) for token ids of shape (N, L), int64."""
        ids, mask = _read(ids, self.pad, self.cuts)
        return logits_of(self.model(input_ids=ids, attention_mask=mask.long()))


def _read(ids: Tensor, pad: int, cuts: bool) -> tuple[Tensor, Tensor]:
    """A batch cut to its longest sentence, which only saves time, and its mask; see `seen`."""
    mask = seen(ids, pad)
    longest = int(mask.sum(1).max()) if cuts else ids.shape[1]
    return ids[:, :longest], mask[:, :longest]


def seen(ids: Tensor, pad: int) -> Tensor:
    """Returns which positions belong to a sentence: all before the padding at its end, and always the first.

    A padding id inside a sentence counts as a word, since an end token may serve as padding.

    Example:
        >>> seen(torch.tensor([[3, 0, 4, 0], [0, 0, 0, 0]]), 0).int().tolist()
        [[1, 1, 1, 0], [1, 0, 0, 0]]
    """
    later = (ids != pad).long().flip(1).cummax(1).values.flip(1).bool()
    later[:, 0] = True  # attention over no position is NaN
    return later


def build(spec: ModelSpec, place: str, num_outputs: int) -> Built:
    """Builds a classifier of token ids, a `Pooled` or a `Masked`.

    Args:
        spec: its options are of `OPTIONS`, and have a `vocabulary`.
        place: a folder, or a name on the Hub; not used if the options have a configuration.
        num_outputs: classes of its task, for a new head.

    Raises:
        HoldfastError: if the model does not exist or cannot read this vocabulary, or an option is unknown or would have
            no effect.
    """
    check_known(spec, OPTIONS)
    name, options = spec.name.removeprefix("hf:"), spec.options
    vocabulary = vocabulary_of(name, options["vocabulary"])
    pooling = options.get("pooling")
    if pooling is not None and pooling not in POOLINGS:
        raise unknown("pooling", str(pooling), POOLINGS)
    network: Pooled | Masked
    notes: tuple[str, ...] = ()
    if options.get("config") is not None:
        network, fresh_head = _from_config(name, options["config"], pooling, num_outputs, vocabulary), True
        kept = {**options, "pooling": _pooling_of(network)}
    else:
        config = configuration(place)
        check_size(name, config, vocabulary)
        check_vocabulary(name, place, vocabulary)
        is_classifier = any(str(a).endswith("ForSequenceClassification") for a in config.architectures or ())
        own = is_classifier if pooling is None else pooling == OWN
        if not own and options.get("num_labels") not in (None, num_outputs):
            raise HoldfastError(
                f"hf:{name}: num_labels replaces a classifier's own head by a fresh one, but a head on pooled features "
                f"is always new, with the {num_outputs} outputs of the task; leave it out."
            )
        network, plain, fresh_head, notes = (
            _own(name, place, config, options.get("num_labels"), vocabulary)
            if own
            else _pooled(name, place, config, pooling, num_outputs, vocabulary)
        )
        kept = {"config": plain, "pooling": _pooling_of(network), "vocabulary": asdict(vocabulary)}
    return Built(
        network,
        spec.model_copy(update={"options": kept}),
        head="head" if isinstance(network, Pooled) else None,
        foreign=True,
        vocabulary=vocabulary,
        fresh_head=fresh_head and spec.weights is None,
        notes=notes,
    )


_Loaded = tuple[Pooled | Masked, dict[str, Any], bool, tuple[str, ...]]
"""A network, its configuration, whether its head is fresh, and notes."""


def _pooled(
    name: str, place: str, config: Any, pooling: str | None, num_outputs: int, vocabulary: Vocabulary
) -> _Loaded:
    """An encoder's or a causal model's weights, with a new head."""
    from transformers import AutoModel

    _refuse_pairs(name, config)
    body, missing_keys, notes = _loaded(name, AutoModel, place)
    missing = [key for key in missing_keys if not key.startswith("pooler.")]
    if missing:
        raise HoldfastError(f"hf:{name} has no weights for {listed(missing)}; it is not a trained encoder.")
    chosen = pooling or _its_pooling(place) or ("last" if is_causal(config) else "mean")
    network = Pooled(_without_pooler(body), config.hidden_size, num_outputs, pooling=chosen, pad=vocabulary.pad)
    return network, plain_config(config), not _has_head(network, place), notes


def _own(name: str, place: str, config: Any, num_labels: int | None, vocabulary: Vocabulary) -> _Loaded:
    """A sequence classifier with its own head, or with a fresh one of `num_labels` outputs."""
    from transformers import AutoModelForSequenceClassification

    _refuse_pairs(name, config)
    fresh = num_labels is not None and config.num_labels != num_labels
    more = {"num_labels": num_labels, "ignore_mismatched_sizes": True} if fresh else {}
    model, missing, notes = _loaded(name, AutoModelForSequenceClassification, place, **more)
    if missing and not fresh:
        raise HoldfastError(
            f"hf:{name} has no weights for {listed(missing)}; it is not a trained classifier. Leave pooling out, or "
            "set mean, cls or last, for a new head."
        )
    plain = plain_config(model.config)
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        return Masked(model, vocabulary.pad), plain, fresh, notes
    # A causal model scores every position and takes the last. Pooling first is equivalent, and gives the head vectors.
    body: Any = model.base_model
    network = Pooled(body, score.in_features, score.out_features, pooling="last", pad=vocabulary.pad)
    with torch.no_grad():
        network.head.weight.copy_(score.weight)
        nn.init.zeros_(network.head.bias)
        if score.bias is not None:
            network.head.bias.copy_(score.bias)
    return network, plain, fresh, notes


def _from_config(
    name: str, config: Mapping[str, Any], pooling: str | None, num_outputs: int, vocabulary: Vocabulary
) -> Pooled | Masked:
    """Fresh weights by a configuration, which may be untrusted."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    check_config(name, config)
    try:
        made = AutoConfig.for_model(**config)
        _refuse_pairs(name, made)
        check_size(name, made, vocabulary)
        if pooling == OWN:
            model = AutoModelForSequenceClassification.from_config(made, trust_remote_code=False)
            return Masked(model, vocabulary.pad)
        body = AutoModel.from_config(made, trust_remote_code=False)
        chosen = pooling or ("last" if is_causal(made) else "mean")
        return Pooled(_without_pooler(body), made.hidden_size, num_outputs, pooling=chosen, pad=vocabulary.pad)
    except HoldfastError:
        raise
    except Exception as error:  # a configuration may hold anything
        raise HoldfastError(
            f"hf:{name}: no language model can be built from its configuration: {type(error).__name__}: "
            f"{first_line(error)}."
        ) from error


def _loaded(name: str, kind: Any, place: str, **more: Any) -> tuple[Any, Sequence[str], tuple[str, ...]]:
    """A network with adapters merged, the names of tensors without weights, and notes."""
    try:
        network, info = from_pretrained(kind, place, **more)
    except Exception as error:  # hundreds of models, a network and a cache raise different exceptions
        raise unusable(name, error) from error
    merged = wrappers.unwrapped(network, f"hf:{name}")
    return merged.network, info["missing_keys"], merged.notes


def _without_pooler(body: Any) -> nn.Module:
    """Removes the pooler of some encoders, which is not used and would not be trained."""
    if isinstance(getattr(body, "pooler", None), nn.Module):
        body.pooler = None
    encoder: nn.Module = body
    return encoder


def _pooling_of(network: Pooled | Masked) -> str:
    return network.pooling if isinstance(network, Pooled) else OWN


def is_causal(config: Any) -> bool:
    """Whether a position sees only those before it; types that also exist as masked language models do not count."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    name = config.model_type
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _its_pooling(place: str) -> str | None:
    """The pooling in a sentence encoder's own files; None if they have none, or one that is not supported."""
    try:
        modes = json.loads((Path(place) / "1_Pooling" / "config.json").read_bytes())
        return next((pooling for pooling, mode in _MODES.items() if modes.get(mode) is True), None)
    except (OSError, ValueError, AttributeError):
        return None


def _refuse_pairs(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise HoldfastError(
            f"hf:{name} is an encoder-decoder model ({config.model_type}); expected an encoder or a causal model."
        )


def vocabulary_of(name: str, values: Any) -> Vocabulary:
    """Returns the vocabulary that an option describes; it may come from an untrusted file."""
    try:
        return TypeAdapter(Vocabulary).validate_python(values)
    except ValidationError as error:
        raise HoldfastError(f"hf:{name}: its description of a vocabulary is unusable: {first_line(error)}.") from error


def check_vocabulary(name: str, place: str, vocabulary: Vocabulary) -> None:
    """Refuses a task whose token ids are not the model's."""
    files = [Path(place) / file for file in ("tokenizer.json", "tokenizer_config.json")]
    if place.endswith(GGUF) or any(file.is_file() for file in files):
        own = load_tokenizer(place).vocabulary
        if not own.agrees(vocabulary):
            raise HoldfastError(
                f"The task's ids are those of the tokenizer {vocabulary.name!r}, and hf:{name} has another; leave the "
                "task's `tokenizer` out, so that the model's own is used."
            )


def check_size(name: str, config: Any, vocabulary: Vocabulary) -> None:
    """Refuses a vocabulary that is larger than the model's embedding."""
    if vocabulary.size > config.vocab_size:
        raise HoldfastError(
            f"hf:{name} has {config.vocab_size} tokens, and the tokenizer {vocabulary.name!r} has {vocabulary.size}; "
            "give the task the model's own tokenizer."
        )


# Saving for transformers

_HEAD = "head.safetensors"
_MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def write(network: Pooled | Masked, folder: Path, names: dict[int, str]) -> None:
    """Writes a language model in the format of transformers.

    A sequence classifier is written as one. Transformers have no class for any other pooled model: its body is written
    for `AutoModel`, its pooling in the format of sentence encoders (`1_Pooling/config.json`), and its head as
    `head.safetensors`, which Holdfast reads.
    """
    classifier: Any = network.model if isinstance(network, Masked) else _scorer(network, names)
    if classifier is not None:
        hf_vision.write(classifier, folder, names)
        return
    assert isinstance(network, Pooled)
    hf_vision.write(network.body, folder, names)
    save_tensors(folder / _HEAD, network.head.state_dict(), {})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": network.head.in_features}
    config |= {mode: pooling == network.pooling for pooling, mode in _MODES.items()}
    write_atomic(folder / "1_Pooling" / "config.json", json.dumps(config, indent=2))


def _scorer(network: Pooled, names: dict[int, str]) -> Any:
    """A causal model's own classifier with these weights, which scores the last token without a bias, or None."""
    from transformers import AutoModelForSequenceClassification

    body: Any = network.body
    if network.pooling != "last" or not is_causal(body.config) or bool(network.head.bias.any()):
        return None
    config = copy.deepcopy(body.config)
    config.id2label, config.pad_token_id = names, network.pad
    try:
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:  # transformers has no classifier for this model
        return None
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None:
        return None
    setattr(model, model.base_model_prefix, body)
    score.weight = network.head.weight
    return model


def _has_head(network: Pooled, place: str) -> bool:
    """Loads the head that `write` saved beside a body, if it has as many classes."""
    path = Path(place) / _HEAD
    if not path.is_file():
        return False
    saved, _ = load_tensors(path)
    own = network.head.state_dict()
    if saved.keys() != own.keys() or any(saved[name].shape != tensor.shape for name, tensor in own.items()):
        return False
    network.head.load_state_dict(saved)
    return True


def write_tokenizer(model: SplitModel, folder: Path) -> None:
    """Writes the tokenizer of a language model, from the folder that the model was loaded from or by its name.

    Raises:
        HoldfastError: if the tokenizer is not found, or has another vocabulary.
    """
    assert model.vocabulary is not None
    for place in filter(None, (model.tokenizer, model.vocabulary.name)):
        try:
            tokenizer = load_tokenizer(place)
        except HoldfastError:
            continue
        if tokenizer.fast is not None and tokenizer.vocabulary.agrees(model.vocabulary):
            tokenizer.fast.save_pretrained(folder)
            return
    raise HoldfastError(
        f"{model.name}: its tokenizer {model.vocabulary.name!r} was not found, and a folder for transformers needs "
        "one. Set model.tokenizer to a folder with its tokenizer.json, or write the model with save(FILE)."
    )
