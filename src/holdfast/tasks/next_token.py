"""Prediction of the next token: what a causal language model is trained for.

With token ids t_0 ... t_L of a row, a model sees t_0 ... t_(L-1) and gives at each position logits of the next token.
Only some positions count: the answer to a prompt, or every position of a text. The negative log-likelihood (NLL) of a
row is the sum over the positions that count of -log p(t_(i+1) | t_0 ... t_i), in nats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator
from typing import ClassVar, Final, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import unknown
from holdfast.losses import distillation_loss
from holdfast.results import TaskFacts
from holdfast.results.terms import KNOWN, Words, words
from holdfast.runtime.devices import device_of
from holdfast.tasks.base import Batch, Split
from holdfast.tasks.in_memory import InMemoryTask
from holdfast.tasks.tokenizers import Vocabulary

IGNORED: Final = -100
"""The target of a position that does not count, as in transformers."""

Measure = Literal["nll", "exact", "choices"]

SCORED_LOGITS = 2**26
"""Logits that are computed at once for scores, red flags and undo moves: 256 MiB in float32."""

PROBED_CLASSES = 1024
"""The largest vocabulary whose ids a linear probe predicts one by one; see `NextTokenTask.probe_targets`."""

PROBE_CODES = 256
"""Length of the random codes that stand for the ids of a larger vocabulary."""


class NextTokenTask(InMemoryTask):
    """Prediction of the next token in rows of token ids.

    A batch's `x` has shape (N, L) and is int64; its `y` has the same shape and holds the next token of each position
    that counts, and -100 elsewhere. Rows are padded on the right.

    Three measures are known. `nll` is the mean NLL a token in nats; an audit compares the *language skill*,
    1 - NLL / `chance`, where `chance` is the NLL of a unigram model: the frequencies of the tokens that count in the
    training split, each counted once more. `exact` is the share of rows whose every token is the most likely one, which
    is the share that greedy decoding reproduces. `choices` is the share of rows whose right answer has a higher
    likelihood than each wrong one.

    Args:
        name: shown in reports and errors.
        train: ids x and targets y, each of shape (N, L); or (N, 1 + K, L), where the first is the row and the others
            are its K wrong answers, with targets of -100 alone where a row has fewer.
        test: likewise.
        vocabulary: what the ids mean.
        measure: the score.

    Raises:
        HoldfastError: if shapes disagree, ids are outside of the vocabulary, a row has no position that counts, or a
            row has no wrong answer although `choices` needs one.

    Example:
        >>> from holdfast.tasks.tokenizers import load_tokenizer
        >>> ids = np.array([[5, 6, 7], [5, 8, 7]])
        >>> split = ids[:, :-1], ids[:, 1:]
        >>> task = NextTokenTask("toy", split, split, vocabulary=load_tokenizer("words").vocabulary)
        >>> task.input_shape, task.output_shape, round(task.chance, 2)
        ((2,), (2, 1024), 6.04)
    """

    kind = "next-token"
    answers_with = "next token"
    output_axis = -1
    error_name = "negative log-likelihood"
    no_features = "a language model answers at every position, and a probe needs one vector a sample"
    suppression_losses = ("ice", "klu", "ce-ascent")
    vocabulary: Vocabulary
    class_names: ClassVar[list[str]] = []  # type: ignore[misc]

    def __init__(
        self,
        name: str,
        train: tuple[npt.ArrayLike, npt.ArrayLike],
        test: tuple[npt.ArrayLike, npt.ArrayLike],
        *,
        vocabulary: Vocabulary,
        measure: Measure = "nll",
    ) -> None:
        if measure not in get_args(Measure):
            raise unknown("measure", measure, get_args(Measure))
        self.name, self.vocabulary, self.measure = name, vocabulary, measure
        x, y = {}, {}
        for split, (ids, targets) in (("train", train), ("test", test)):
            x[split], y[split] = self._checked(split, np.asarray(ids), np.asarray(targets))
        if x["train"].shape[2] != x["test"].shape[2]:
            raise self._bad(f"training rows have {x['train'].shape[2]} tokens, test rows {x['test'].shape[2]}")
        self._unigram = _unigram(y["train"][:, 0], vocabulary.size)
        self._set(x, y)

    def _checked(
        self, split: Split | str, ids: npt.NDArray[np.int64], y: npt.NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        if ids.shape != y.shape or ids.ndim not in (2, 3) or ids.dtype.kind not in "ui" or y.dtype.kind not in "ui":
            raise self._bad(
                f"the {split} split has ids {ids.dtype} {ids.shape} and targets {y.dtype} {y.shape}; expected integers "
                "of one shape, (rows, tokens)"
            )
        if not ids.size:
            raise self._bad(f"the {split} split is empty; give it at least one row")
        x, targets = (torch.from_numpy(a.astype(np.int64).reshape(len(a), -1, a.shape[-1])) for a in (ids, y))
        counted = targets != IGNORED
        for values in (x, targets[counted]):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.vocabulary.size:
                bad = int(values.min()) if values.min() < 0 else int(values.max())
                raise self._bad(
                    f"the {split} split holds the id {bad}; the vocabulary {self.vocabulary.name!r} has ids from 0 to "
                    f"{self.vocabulary.size - 1}"
                )
        silent = (~counted[:, 0].any(-1)).nonzero().flatten()
        if len(silent):
            raise self._bad(f"row {int(silent[0])} of the {split} split has no token that counts; leave it out")
        if self.measure == "choices":
            alone = (~counted[:, 1:].any(-1).any(-1)).nonzero().flatten()
            if len(alone):
                raise self._bad(
                    f"row {int(alone[0])} of the {split} split has no wrong answer, and the measure is choices; give "
                    "it at least one"
                )
        return x, targets

    def _set(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        super()._set(x, y)
        self.input_shape = (x["train"].shape[-1],)
        self.num_outputs = self.vocabulary.size
        self.higher_is_better = self.measure != "nll"
        y_test = y["test"]
        if self.measure == "nll":
            targets = y_test[:, 0]
            self.chance = -float(self._unigram[targets[targets != IGNORED]].mean())
        elif self.measure == "choices":
            self.chance = float((1 / (y_test != IGNORED).any(-1).sum(1).double()).mean())
        else:
            self.chance = 0.0

    def _with(self, name: str, x: dict[str, Tensor], y: dict[str, Tensor], classes: object = None) -> Self:
        # The first axis alone is indexed by all that narrows a task; class names do not exist.
        return super()._with(name, x, y)

    @property
    def baseline(self) -> str:  # type: ignore[override]
        """The predictor whose score is `chance`."""
        return {"nll": "a unigram model", "exact": "no right answer", "choices": "a random choice"}[self.measure]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """See `Task.output_shape`: logits at each position."""
        return (*self.input_shape, self.num_outputs)

    def takes_outputs(self, count: int) -> bool:
        """See `Task.takes_outputs`: an embedding may have other rows than the tokenizer has tokens.

        There may be more, which fill it up to a round number; or fewer, if the tokens without a row do not occur.
        """
        return count >= self.num_outputs or self.token_beyond(count) is None

    def token_beyond(self, count: int) -> str | None:
        """See `Task.token_beyond`; it names the row."""
        if count >= self.num_outputs:
            return None
        for split, x in self._x.items():
            y = self._y[split]
            strange = ((x >= count) & (x != self.vocabulary.pad)) | (y >= count)
            if strange.any():
                row = int(strange.flatten(1).any(1).nonzero()[0])
                ids = torch.cat([v[row][v[row] >= count] for v in (x, y)])
                found = int(ids[ids != self.vocabulary.pad][0] if (ids != self.vocabulary.pad).any() else ids[0])
                return f"row {row} of the {split} split of task {self.name!r} has the id {found}"
        return None

    def rows_at_once(self, wanted: int) -> int:
        """See `Task.rows_at_once`: so many that their logits are at most `SCORED_LOGITS`."""
        return min(wanted, max(1, SCORED_LOGITS // (self.num_outputs * self.input_shape[0])))

    @property
    def audit_unit(self) -> str:
        """See `Task.audit_unit`."""
        return "language skill" if self.measure == "nll" else "accuracy"

    @property
    def words(self) -> Words:
        """See `Task.words`."""
        known = words(self.audit_unit)
        if self.measure == "nll":
            return known
        like = KNOWN["language skill"]
        own = {"guess": self.baseline, "chance": self.baseline, "samples": like.samples, "answers": like.answers}
        return known.model_copy(update={**own, "by_class": False, "has_features": False})

    def tokens(self, split: Split) -> int:
        """Returns how many tokens of a split count."""
        return int((self._y[split][:, 0] != IGNORED).sum())

    def batches(
        self, split: Split, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device
    ) -> Iterator[Batch]:
        """See `Task.batches`; wrong answers are not among them."""
        for x, y in super().batches(split, batch_size, generator=generator, device=device):
            yield Batch(x[:, 0], y[:, 0]) if x.dim() == 3 else Batch(x, y)

    def sweep(self, split: Split, batch_size: int, *, device: torch.device) -> Iterator[Batch]:
        """See `Task.sweep`; wrong answers are not among them."""
        for x, y in super().sweep(split, batch_size, device=device):
            yield Batch(x[:, 0], y[:, 0])

    def weight(self, y: Tensor) -> float:
        """See `Task.weight`: the number of tokens that count."""
        return float((y != IGNORED).sum())

    def counted(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `Task.counted`: logits of shape (M, V) and ids of shape (M,), for the M positions that count."""
        counts = y != IGNORED
        return outputs[counts], y[counts]

    def probed_rows(self, y: Tensor) -> Tensor:
        """See `Task.probed_rows`: the positions that count, shape (N L,)."""
        return (y != IGNORED).flatten()

    def probe_targets(self, y: Tensor) -> Tensor:
        """See `Task.probe_targets`: the next tokens, shape (M,); of a large vocabulary, their random codes, (M, 256).

        One-hot targets of a large vocabulary would be as large as its logits. Codes of random signs are nearly
        orthogonal, so a share of their energy is about the same share of the one-hot energy.
        """
        ids = y[y != IGNORED]
        if self.num_outputs <= PROBED_CLASSES:
            return ids
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(2, (self.num_outputs, PROBE_CODES), generator=generator, dtype=torch.int8)
        return codes.to(ids.device)[ids].float() * 2 - 1

    def targets(self, y: Tensor) -> Tensor:
        """Refused: a row has no single target.

        Raises:
            HoldfastError: always.
        """
        raise self._bad(str(self.no_features))

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Task.loss_of`: the mean NLL of the tokens that count."""
        return F.cross_entropy(outputs.flatten(0, 1), batch.y.flatten(), ignore_index=IGNORED)

    def distance(self, outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        """See `Task.distance`: between the distributions of the next token, the mean over positions."""
        return distillation_loss(outputs, wanted, temperature)

    def batch_skill(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.batch_skill`: 1 - NLL / NLL of the unigram model, at least 0."""
        logits, ids = self.counted(outputs.detach(), batch.y)
        known = -float(self._unigram.to(ids.device)[ids].mean())
        return max(0.0, 1 - float(F.cross_entropy(logits.float(), ids)) / known)

    def score_of(self, outputs: Tensor, batch: Batch) -> float:
        """See `Task.score_of`; for `choices`, the share of tokens that are the most likely ones."""
        if self.measure == "nll":
            return float(self.loss_of(outputs.detach().float(), batch))
        right = (outputs.detach().argmax(-1) == batch.y) | (batch.y == IGNORED)
        if self.measure == "exact":
            return float(right.all(-1).float().mean())
        return float(right[batch.y != IGNORED].float().mean())

    def outcomes_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the NLL of each row, the sum over its tokens that count; for `exact`, whether all are right."""
        if self.measure == "exact":
            return ((outputs.argmax(-1) == batch.y) | (batch.y == IGNORED)).all(-1)
        logs = F.cross_entropy(outputs.float().transpose(1, 2), batch.y, ignore_index=IGNORED, reduction="none")
        return logs.double().sum(-1)

    @torch.no_grad()
    def outcomes(self, model: nn.Module, split: Split = "test") -> Tensor:
        """See `Task.outcomes`; for `nll`, a row counts as much as it has tokens."""
        device, training = device_of(model), model.training
        model.eval()
        x, y = self._on(split, device)
        answers = x.shape[1] if self.measure == "choices" else 1
        ids, targets = (v[:, :answers].flatten(0, 1) for v in (x, y))
        size = self.rows_at_once(len(ids))
        parts, finite = [], torch.ones((), dtype=torch.bool, device=device)
        for start in range(0, len(ids), size):
            batch = Batch(ids[start : start + size], targets[start : start + size])
            outputs = model(batch.x)
            finite &= outputs.isfinite().all()
            parts.append(self.outcomes_of(outputs, batch))
        model.train(training)
        values = torch.cat(parts).to("cpu", torch.float64)
        if not bool(finite):
            return torch.full((len(x),), torch.nan, dtype=torch.float64)
        if self.measure == "nll":
            return values * len(values) / self.tokens(split)
        return values if self.measure == "exact" else self._chosen(values, targets.cpu(), answers)

    def _chosen(self, nll: Tensor, targets: Tensor, answers: int) -> Tensor:
        """Whether each row's right answer, the first, is the most likely; missing ones are infinitely unlikely."""
        there = (targets != IGNORED).any(-1)
        nll = torch.where(there, nll, math.inf).view(-1, answers)
        return (nll[:, 0] < nll[:, 1:].min(1).values).double()

    def answers(self, split: Split) -> list[Hashable]:
        """See `InMemoryTask.answers`: a hash of the targets of each row."""
        rows = self._y[split].contiguous().numpy()
        return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows]

    def facts(self) -> TaskFacts:
        """See `Task.facts`; the hash covers the vocabulary and the measure, and classes do not count."""
        plain = super().facts()
        both = hashlib.sha256(f"{plain.sha256} {self.vocabulary.sha256} {self.measure}".encode()).hexdigest()
        return plain.model_copy(update={"sha256": both, "classes": 1, "tokenizer": self.vocabulary.name})

    def with_inputs(self, train: Tensor, test: Tensor) -> Self:
        """Refused: a row has no feature vector.

        Raises:
            HoldfastError: always.
        """
        raise self._bad(str(self.no_features))


def _unigram(y: Tensor, size: int) -> Tensor:
    """Log-frequencies of the tokens that count, each counted once more: shape (V,), float64."""
    counts = torch.bincount(y[y != IGNORED], minlength=size).double() + 1
    return (counts / counts.sum()).log()
