"""Checks of loaded tasks before any verb uses them: a summary of what was read, and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from holdfast.errors import HoldfastError
from holdfast.results import Flag, Reading, TaskFacts
from holdfast.tasks import Task
from holdfast.tasks.base import Split
from holdfast.tasks.in_memory import InMemoryTask

SPLITS: tuple[Split, Split] = ("train", "test")

FLAGGED = 0.01
"""Share of the test or restricted samples from which an overlap is a red flag, not only a warning in the report."""

HELD = "Leaking test samples"
SHARED = "Tasks that share samples"


@dataclass
class Validated:
    """Results of the checks.

    Attributes:
        facts: of each task, with a summary of what was read.
        flags: warnings for an audit.
    """

    facts: dict[str, TaskFacts]
    flags: list[Flag] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns what was read: a line for each task, note and warning."""
        lines = []
        for part, facts in self.facts.items():
            if facts.read is not None:
                lines.append(f"Read {part}: {facts.name} from {facts.read.source}: {facts.read.sentence(facts)}")
                lines += [f"  note: {note}" for note in facts.read.notes]
                lines += [f"  warning: {warning}" for warning in facts.read.warnings]
        return lines


def validate(tasks: Mapping[str, Task]) -> Validated:
    """Checks tasks before they are used.

    Args:
        tasks: by their part; the last word of a part is `benign`, `restricted`, `transfer` or another. Parts that have
            the same words before it belong together.

    Returns:
        A summary of each, and warnings.

    Raises:
        HoldfastError: if the restricted task is the benign or the transfer task, or a class has no samples.

    Example:
        >>> from holdfast.tasks import load_task
        >>> checked = validate({"benign": load_task("digits[0-4]"), "restricted": load_task("digits[5-9]")})
        >>> print(checked.lines()[0])
        Read benign: digits[0-4] from embedded data of scikit-learn: 678 training and 223 test samples...
        >>> checked.flags
        []
    """
    hashed = {id(task): task for task in tasks.values()}
    seen = {key: _Hashed(task) for key, task in hashed.items()}
    warnings: dict[str, list[str]] = {part: [] for part in tasks}
    flags: list[Flag] = []
    for part, task in tasks.items():
        task.check_classes()
        _leaks(part, seen[id(task)], warnings[part], flags)
    for part, task in tasks.items():
        before, _, role = part.rpartition(" ")
        if role != "restricted":
            continue
        for other in ("benign", "transfer"):
            key = f"{before} {other}".strip()
            if key in tasks:
                _compare(other, seen[id(tasks[key])], seen[id(task)], warnings[part], flags)
    facts = {part: seen[id(task)].facts(warnings[part]) for part, task in tasks.items()}
    return Validated(facts, flags)


class _Hashed:
    """One task with hashes of its samples."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.hashes: dict[str, list[bytes]] = {
            s: task.hashes(s) if isinstance(task, InMemoryTask) else [] for s in SPLITS
        }
        self.plain = task.facts()

    def pairs(self, split: Split) -> list[tuple[bytes, Hashable]]:
        assert isinstance(self.task, InMemoryTask)
        return list(zip(self.hashes[split], self.task.answers(split), strict=True))

    def facts(self, warnings: list[str]) -> TaskFacts:
        task = self.task
        if not isinstance(task, InMemoryTask):
            return self.plain
        counts = {s: samples for s in SPLITS if (samples := task.counts(s))}
        low, high = task.value_range()
        read = Reading(
            source=task.source,
            task_kind=task.kind,
            shape=list(task._x["train"].shape[1:]),
            low=low,
            high=high,
            class_names=list(task.class_names) if counts else [],
            samples=counts,
            notes=[*task.notes, *self._notes()],
            warnings=warnings,
        )
        return self.plain.model_copy(update={"read": read})

    def _notes(self) -> list[str]:
        """Duplicates, contradictory labels, constant inputs, and names that differ only in case."""
        assert isinstance(self.task, InMemoryTask)
        notes = []
        train = self.hashes["train"]
        counted = Counter(train)
        if len(counted) < len(train):
            notes.append(f"{len(train) - len(counted)} of {len(train)} training inputs are duplicates of others")
        if self.task.labels_are_classes:
            labels: dict[bytes, set[Hashable]] = {}
            for key, label in self.pairs("train"):
                labels.setdefault(key, set()).add(label)
            contradictory = sum(counted[key] for key, own in labels.items() if len(own) > 1)
            if contradictory:
                notes.append(f"{contradictory} training inputs come with different labels")
        names = Counter(name.casefold() for name in self.task.class_names)
        alike = [name for name in self.task.class_names if names[name.casefold()] > 1]
        if alike:
            more = f" and {len(alike) - 8} more" if len(alike) > 8 else ""
            notes.append(f"classes whose names differ only in case: {', '.join(alike[:8])}{more}")
        low, high = self.task.value_range()
        if low == high:
            notes.append(f"all inputs are {low:g} everywhere")
        elif self.task._x["train"].dim() == 4 and 0 < high <= 15:
            notes.append(f"the images are almost black: no value is above {high:g} of 255")
        return notes


def _leaks(part: str, seen: _Hashed, warnings: list[str], flags: list[Flag]) -> None:
    """Test inputs that are among the training inputs."""
    learned, tested = set(seen.hashes["train"]), seen.hashes["test"]
    count = sum(key in learned for key in tested)
    if not count:
        return
    share = count / len(tested)
    warning = f"{count} of {len(tested)} test samples ({share:.1%}) are among the training samples"
    warnings.append(warning)
    if share >= FLAGGED:
        flags.append(
            Flag(
                name=HELD,
                severity="warning",
                found=f"Of the {part} task {seen.task.name}, {warning}.",
                remedy="Remove them from one of the two splits, or scores show memorised samples. In a table with few "
                "distinct rows, some overlap is natural.",
            )
        )


def _compare(other: str, harmless: _Hashed, restricted: _Hashed, warnings: list[str], flags: list[Flag]) -> None:
    if _same(harmless, restricted):
        raise HoldfastError(
            f"The restricted task {restricted.task.name!r} and the {other} task {harmless.task.name!r} are the same "
            "data; a model cannot stay good at what it must not learn. Give two different tasks."
        )
    known = {*harmless.hashes["train"], *harmless.hashes["test"]}
    own = [*restricted.hashes["train"], *restricted.hashes["test"]]
    count = sum(key in known for key in own)
    if not count:
        return
    share = count / len(own)
    warning = f"{count} of {len(own)} samples ({share:.1%}) are also in the {other} task {harmless.task.name}"
    warnings.append(warning)
    if share >= FLAGGED and other == "benign":
        flags.append(
            Flag(
                name=SHARED,
                severity="warning",
                found=f"Of the restricted task {restricted.task.name}, {warning}.",
                remedy="Remove them from one of the two, unless both tasks use the same samples on purpose.",
            )
        )


def _same(a: _Hashed, b: _Hashed) -> bool:
    """Whether two tasks have the same training inputs and answers, up to order and numbering of classes."""
    if a.plain.sha256 == b.plain.sha256:
        return True
    first, second = set(a.hashes["train"]), set(b.hashes["train"])
    if not first or first != second or a.task.kind != b.task.kind:
        return False
    assert isinstance(a.task, InMemoryTask)
    assert isinstance(b.task, InMemoryTask)
    left, right = dict(a.pairs("train")), dict(b.pairs("train"))
    return a.task.same_answers(b.task, [(left[key], right[key]) for key in first])
