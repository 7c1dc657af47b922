"""Between loading tasks and using them, in every verb: what was read, and whether it can be meant."""

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
"""Overlap from this share of the test or restricted samples on is a red flag, and not only a warning in the report."""

HELD = "Leaking test samples"
SHARED = "Tasks that share samples"


@dataclass
class Validated:
    """What was found in the tasks of a job.

    Attributes:
        facts: of each task, with what was read.
        flags: warnings for an audit.
    """

    facts: dict[str, TaskFacts]
    flags: list[Flag] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns what was read, a line a task and one for each thing to know."""
        found = []
        for part, facts in self.facts.items():
            read = facts.read
            if read is None:
                continue
            found.append(f"Read {part}: {facts.name} from {read.source}: {read.sentence(facts)}")
            found += [f"  note: {note}" for note in read.notes]
            found += [f"  warning: {warning}" for warning in read.warnings]
        return found


def validate(tasks: Mapping[str, Task]) -> Validated:
    """Looks at the tasks of a job before anything is computed with them.

    Args:
        tasks: by their part; the last word of a part is `benign`, `restricted`, `transfer` or another. Parts that agree
            in what is before it belong together.

    Returns:
        What was read of each, and warnings.

    Raises:
        HoldfastError: if the restricted task is the benign or the transfer task, or a class has no samples.

    Example:
        >>> from holdfast.tasks import load_task
        >>> found = validate({"benign": load_task("digits[0-4]"), "restricted": load_task("digits[5-9]")})
        >>> print(found.lines()[0])
        Read benign: digits[0-4] from embedded data of scikit-learn: 678 training and 223 test samples...
        >>> found.flags
        []
    """
    seen: dict[int, _Seen] = {}
    for task in tasks.values():
        if id(task) not in seen:
            seen[id(task)] = _Seen(task)
    warnings: dict[str, list[str]] = {part: [] for part in tasks}
    flags: list[Flag] = []
    for part, task in tasks.items():
        task.check_classes()
        _leaks(part, seen[id(task)], warnings[part], flags)
    for part, task in tasks.items():
        before, _, role = part.rpartition(" ") if " " in part else ("", "", part)
        if role != "restricted":
            continue
        for other in ("benign", "transfer"):
            key = f"{before} {other}".strip()
            if key in tasks:
                _compare(other, seen[id(tasks[key])], seen[id(task)], warnings[part], flags)
    facts = {part: seen[id(task)].facts(warnings[part]) for part, task in tasks.items()}
    return Validated(facts, flags)


class _Seen:
    """One task, and hashes of its samples."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.hashes: dict[str, list[bytes]] = {
            s: task.hashes(s) if isinstance(task, InMemoryTask) else [] for s in SPLITS
        }
        self.plain = task.facts()

    def every(self) -> set[bytes]:
        return {*self.hashes["train"], *self.hashes["test"]}

    def pairs(self, split: Split) -> list[tuple[bytes, Hashable]]:
        assert isinstance(self.task, InMemoryTask)
        return list(zip(self.hashes[split], self.task.answers(split), strict=True))

    def facts(self, warnings: list[str]) -> TaskFacts:
        task = self.task
        if not isinstance(task, InMemoryTask):
            return self.plain
        counts = {s: found for s in SPLITS if (found := task.counts(s))}
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
        """Duplicates, contradictions, inputs that are all the same, and names that differ in capitals only."""
        found = []
        train = self.hashes["train"]
        counted = Counter(train)
        if len(counted) < len(train):
            found.append(f"{len(train) - len(counted)} of {len(train)} training inputs are duplicates of others")
        if self.task.labels_are_classes:
            labels: dict[bytes, set[Hashable]] = {}
            for key, label in self.pairs("train"):
                labels.setdefault(key, set()).add(label)
            several = sum(counted[key] for key, of in labels.items() if len(of) > 1)
            if several:
                found.append(f"{several} training inputs come with different labels")
        assert isinstance(self.task, InMemoryTask)
        names = Counter(name.casefold() for name in self.task.class_names)
        alike = [name for name in self.task.class_names if names[name.casefold()] > 1]
        if alike:
            found.append(f"classes whose names differ in capitals only: {', '.join(alike)}")
        low, high = self.task.value_range()
        if low == high:
            found.append(f"all inputs are {low:g} everywhere")
        elif isinstance(self.task, InMemoryTask) and self.task._x["train"].dim() == 4 and high <= 15 and high > 0:
            found.append(f"the images are almost black: no value is above {high:g} of 255")
        return found


def _leaks(part: str, seen: _Seen, warnings: list[str], flags: list[Flag]) -> None:
    """Test inputs that are among the training inputs."""
    learned, tested = set(seen.hashes["train"]), seen.hashes["test"]
    count = sum(key in learned for key in tested)
    if not count:
        return
    share = count / len(tested)
    found = f"{count} of {len(tested)} test samples ({share:.1%}) are among the training samples"
    warnings.append(found)
    if share >= FLAGGED:
        flags.append(
            Flag(
                name=HELD,
                severity="warning",
                found=f"Of the {part} task {seen.task.name}, {found}.",
                remedy="Remove them from one of the two splits, or scores show what was learned by heart. Of a table "
                "with few distinct rows, some overlap is natural.",
            )
        )


def _compare(other: str, harmless: _Seen, restricted: _Seen, warnings: list[str], flags: list[Flag]) -> None:
    if _same(harmless, restricted):
        raise HoldfastError(
            f"The restricted task {restricted.task.name!r} and the {other} task {harmless.task.name!r} are the same "
            "data; a model cannot stay good at what it must not learn. Give two different tasks."
        )
    known, own = harmless.every(), [*restricted.hashes["train"], *restricted.hashes["test"]]
    count = sum(key in known for key in own)
    if not count:
        return
    share = count / len(own)
    found = f"{count} of {len(own)} samples ({share:.1%}) are also in the {other} task {harmless.task.name}"
    warnings.append(found)
    if share >= FLAGGED and other == "benign":
        flags.append(
            Flag(
                name=SHARED,
                severity="warning",
                found=f"Of the restricted task {restricted.task.name}, {found}.",
                remedy="Remove them from one of the two, unless these are two tasks over the same samples on purpose.",
            )
        )


def _same(a: _Seen, b: _Seen) -> bool:
    """Whether two tasks have the same training inputs with the same answers, up to order and numbering of classes."""
    if a.plain.sha256 == b.plain.sha256:
        return True
    first, second = set(a.hashes["train"]), set(b.hashes["train"])
    if not first or first != second or a.task.kind != b.task.kind:
        return False
    assert isinstance(a.task, InMemoryTask)
    assert isinstance(b.task, InMemoryTask)
    left, right = dict(a.pairs("train")), dict(b.pairs("train"))
    return a.task.same_answers(b.task, [(left[key], right[key]) for key in first])
