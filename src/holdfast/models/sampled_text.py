"""Text that a causal language model wrote itself, as its benign task.

The data that a model was trained on are often not public. What it writes by itself stands for them: a model that
gives its own text the same likelihood as before is still the same model there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.errors import HoldfastError
from holdfast.models.compatibility import check_length
from holdfast.models.families.hf_causal import CausalModel
from holdfast.models.loading import load_model
from holdfast.models.split_model import SplitModel
from holdfast.runtime.devices import cpu_threads
from holdfast.tasks import NextTokenTask, TaskSpec, Tokenizer, load_tokenizer
from holdfast.tasks.next_token import IGNORED
from holdfast.tasks.next_token_files import WINDOW

BATCH = 250
"""Rows that are written at once."""


def sampled_task(spec: TaskSpec, data_dir: Path | str | None = None) -> NextTokenTask:
    """Returns a next-token task over rows that a model writes, at temperature 1, from its first token on.

    Args:
        spec: `sampled` rows; `tokenizer` is the folder or name of the model, and `length` the tokens of a row.
            `test_fraction` of the rows are for testing, and `seed` decides what is written.
        data_dir: see `load_model`.

    Raises:
        HoldfastError: if there is no such model, or a setting has no effect.
    """
    for key in ("text", "target", "measure", "loss_on", "image_size", "channels"):
        if getattr(spec, key) != TaskSpec.model_fields[key].default:
            raise HoldfastError(f"A task that is sampled from the model has no {key}; leave it out.")
    if spec.tokenizer is None:
        raise HoldfastError("A sampled task needs a model hf:NAME to write it; give one, or its folder as `tokenizer`.")
    assert spec.sampled is not None
    held = round(spec.sampled * spec.test_fraction)
    if not 0 < held < spec.sampled:
        raise HoldfastError(
            f"sampled is {spec.sampled}, of which {held} rows would be for testing (test_fraction "
            f"{spec.test_fraction:g}); both splits need at least one."
        )
    length = spec.length or WINDOW
    folder = None if data_dir is None else str(data_dir)
    ids, eos = _written(spec.tokenizer.removeprefix("hf:"), spec.sampled, length, spec.seed, folder)
    over = np.cumsum(ids[:, 1:] == eos, axis=1) - (ids[:, 1:] == eos) > 0  # after the first end token
    x, y = ids[:, :-1], np.where(over, IGNORED, ids[:, 1:])
    vocabulary = load_tokenizer(spec.tokenizer.removeprefix("hf:"), data_dir and Path(data_dir)).vocabulary
    task = NextTokenTask("sampled", (x[held:], y[held:]), (x[:held], y[:held]), vocabulary=vocabulary)
    counted = f"{task.tokens('train')} training and {task.tokens('test')} test tokens count"
    task = task.noted(
        f"{spec.sampled} rows of at most {length} tokens that {vocabulary.name} wrote, seed {spec.seed}", counted
    )
    if spec.train_limit is not None:
        task = task.limit_train(spec.train_limit, spec.seed)
    return task if spec.test_limit is None else task.limit_test(spec.test_limit, spec.seed)


@lru_cache(maxsize=4)
def _written(name: str, rows: int, length: int, seed: int, data_dir: str | None) -> tuple[np.ndarray, int]:
    """Ids of shape (rows, length + 1), and the end token; rows are padded with it."""
    folder = None if data_dir is None else Path(data_dir)
    tokenizer = load_tokenizer(name, folder)
    fast: Any = tokenizer.fast
    start = None if fast is None else fast.bos_token_id if fast.bos_token_id is not None else fast.eos_token_id
    if start is None or fast.eos_token_id is None:
        raise HoldfastError(f"The tokenizer {name!r} has no start and end token, so nothing can be sampled.")
    made_up = np.full((1, 2), start)
    task = NextTokenTask("sampling", (made_up, made_up), (made_up, made_up), vocabulary=tokenizer.vocabulary)
    model = load_model(f"hf:{name}", task, data_dir=folder)
    assert isinstance(model, CausalModel)
    check_length(model.name, model.context, length, "rows to sample")
    network: Any = model.network.eval()
    # An embedding may have rows without a token.
    unused = list(range(tokenizer.vocabulary.size, model.num_outputs)) or None
    ids = np.full((rows, length + 1), fast.eos_token_id, dtype=np.int64)
    # One thread: sums in another order can change which token is drawn, and the data must not depend on the machine.
    with cpu_threads(1), torch.random.fork_rng(devices=[]), torch.no_grad(), _plain_sampling(network):
        torch.manual_seed(seed)
        for first in range(0, rows, BATCH):
            count = min(BATCH, rows - first)
            start_tokens = torch.full((count, 1), start)
            drawn = network.generate(
                start_tokens, attention_mask=torch.ones_like(start_tokens), max_new_tokens=length, do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, pad_token_id=fast.eos_token_id, eos_token_id=fast.eos_token_id,
                suppress_tokens=unused,
            )  # fmt: skip
            ids[first : first + count, : drawn.shape[1]] = drawn.numpy()
    return ids, int(fast.eos_token_id)


PROMPT_TOKENS = 24
"""Tokens of a text that a model continues at most, if the text has no prompt of its own."""


@contextmanager
def _plain_sampling(network: Any) -> Iterator[None]:
    """Sets the model's own generation settings aside, such as a penalty on repetition: they change what it samples."""
    from transformers import GenerationConfig

    own = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = own


def continuations(
    model: CausalModel, task: NextTokenTask, tokenizer: Tokenizer, *, rows: int, tokens: int, seed: int
) -> list[tuple[str, str]]:
    """Returns what a model writes after the beginnings of some test rows, at temperature 1.

    Args:
        model: on any device.
        task: its first test rows give the prompts: what comes before the tokens that count, or the beginning of a text.
        tokenizer: the model's own.
        rows: how many.
        tokens: to write after each, at most.
        seed: of the draws; the same for all models, so that equal models write the same.

    Returns:
        For each row, the prompt and what follows.
    """
    fast: Any = tokenizer.fast
    network: Any = model.network
    training = model.training
    model.eval()
    written = []
    for x, y in zip(*next(task.sweep("test", rows, device=model.device)), strict=True):
        counted = (y != IGNORED).nonzero().flatten()
        first, last = int(counted[0]) + 1, int(counted[-1]) + 1
        prompt = x[: first if first > 1 else max(1, min(PROMPT_TOKENS, last // 2))]
        read = prompt if model.prefix is None else torch.cat([model.prefix.to(prompt), prompt])
        read = read[-max(1, model.context - tokens) :]  # a longer context than the model's is cut at its beginning
        room = min(tokens, model.context - len(read))
        with torch.random.fork_rng(), torch.no_grad(), _plain_sampling(network):
            torch.manual_seed(seed)
            drawn = network.generate(
                read[None], attention_mask=torch.ones_like(read[None]), max_new_tokens=room, do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, pad_token_id=task.vocabulary.pad, renormalize_logits=True,
                remove_invalid_values=True,
            )  # fmt: skip
        parts = (prompt, drawn[0, len(read) :])
        before, after = (fast.decode(part.tolist(), skip_special_tokens=True) for part in parts)
        written.append((str(before), str(after)))
    model.train(training)
    return written


def tokenizer_of(model: SplitModel) -> Tokenizer | None:
    """Returns a model's tokenizer, from where the model was loaded or by its name; None if it is not found.

    Example:
        >>> from holdfast.tasks import load_task
        >>> tokenizer_of(load_model("mlp", load_task("digits"))) is None
        True
    """
    for place in filter(None, (model.tokenizer, model.vocabulary and model.vocabulary.name)):
        try:
            tokenizer = load_tokenizer(place)
        except HoldfastError:
            continue
        if tokenizer.fast is not None and model.vocabulary and tokenizer.vocabulary.agrees(model.vocabulary):
            return tokenizer
    return None
