"""The leaderboard: the audits of many folders on one page, in groups of comparable audits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import scipy

from holdfast.errors import HoldfastError
from holdfast.report import wording
from holdfast.report.html import environment
from holdfast.results import AuditResult, Interval, RunResult, read_result
from holdfast.runtime.storage import write_atomic

FEW_SEEDS = 3
"""With fewer seeds the spread is not reliable."""

WEAK_BATTERIES = ("quick-v1", "side-effects-v1")
"""Batteries for a first look: if only they failed to break a model, it is not known to resist."""


@dataclass(frozen=True)
class Entry:
    """One audit.

    Attributes:
        where: its folder, relative to the leaderboard's.
        result: the content of its `result.json`.
        audit: the audit in it.
    """

    where: str
    result: RunResult
    audit: AuditResult

    @property
    def group(self) -> tuple[str, str, int, int, str]:
        """Two audits compare only if these are the same."""
        a = self.audit
        return a.benign_task, a.restricted_task, a.budgets[-1], a.adversary_samples, a.unit

    @property
    def key(self) -> wording.KeyNumbers:
        """See `key_numbers`."""
        return wording.key_numbers(self.audit)

    @property
    def model(self) -> str:
        """Architecture of the model."""
        facts = self.result.provenance.models.get("immunized")
        return facts.name if facts else "not recorded"

    @property
    def defense(self) -> str:
        """Name of the defense, if the run made the model."""
        return self.result.immunization.defense if self.result.immunization else "not recorded"

    @property
    def cost_ratio(self) -> float | None:
        """Steps to the target score, divided by those from scratch."""
        return wording.cost_ratio(self.audit)

    @property
    def cost_known(self) -> bool:
        """Whether the costs were measured at all."""
        return any(c.role == "immunized" for c in self.audit.costs)

    @property
    def lost(self) -> float | None:
        """The largest loss on a harmless task."""
        return max((e.lost for e in self.audit.side_effects if e.lost is not None), default=None)

    @property
    def reported(self) -> float | None:
        """The restricted score after the last budget that the publisher, or the paper, claims."""
        if self.audit.reported is not None:
            return self.audit.reported
        return wording.paper_of_best(self.result).get(("immunized", self.audit.budgets[-1]))

    @property
    def measured(self) -> Interval | None:
        """A 95 % interval of the same score as measured: over seeds, and for accuracies over test samples."""
        cell = self.key.last.best["immunized"]
        if cell.mean is None or cell.sd is None:
            return None
        half = float(scipy.special.stdtrit(cell.n - 1, 0.975)) * cell.sd / math.sqrt(cell.n)
        if self.audit.spoken.is_share and self.audit.test_samples:
            samples = max(cell.mean * (1 - cell.mean), 0) / self.audit.test_samples
            half = math.hypot(half, float(scipy.special.ndtri(0.975)) * math.sqrt(samples))
        return Interval(low=cell.mean - half, high=cell.mean + half)

    @property
    def unreliable(self) -> list[str]:
        """Reasons not to rely on the audit."""
        audit = self.audit
        reasons = ["the audit is invalid"] if audit.verdict.label == "invalid" else []
        reasons += [f"critical red flag: {f.name}" for f in audit.flags if f.severity == "critical"]
        if audit.battery in WEAK_BATTERIES:
            reasons.append(f"battery {audit.battery} only")
        if len(audit.seeds) < FEW_SEEDS:
            reasons.append("one seed" if len(audit.seeds) == 1 else f"{len(audit.seeds)} seeds only")
        reported, measured = self.reported, self.measured
        if reported is not None and measured is not None and not measured.low <= reported <= measured.high:
            reasons.append(f"reported {reported:.1%}, but measured {measured.low:.1%} to {measured.high:.1%}")
        return reasons


@dataclass(frozen=True)
class Leaderboard:
    """The results under a folder.

    Attributes:
        entries: the audits.
        others: folders whose result holds no audit, with the kind of their job.
        damaged: folders whose result could not be read, with the error.
    """

    entries: list[Entry]
    others: list[tuple[str, str]]
    damaged: list[tuple[str, str]]

    @property
    def groups(self) -> list[tuple[tuple[str, str, int, int, str], list[Entry]]]:
        """Groups of comparable audits; in each, reliable audits first, then by retained advantage, least first."""

        def order(entry: Entry) -> tuple[bool, float, str]:
            retained = entry.audit.verdict.retained
            return bool(entry.unreliable), math.inf if retained is None else retained, entry.where

        groups: dict[tuple[str, str, int, int, str], list[Entry]] = {}
        for entry in sorted(self.entries, key=order):
            groups.setdefault(entry.group, []).append(entry)
        return sorted(groups.items())


def collect(folder: Path) -> Leaderboard:
    """Reads every `result.json` under a folder; those that cannot be read are listed.

    Raises:
        HoldfastError: if there is no `result.json`.
    """
    paths = sorted(folder.rglob("result.json"))
    if not paths:
        raise HoldfastError(
            f"There is no result.json under {str(folder)!r}; expected folders of `holdfast run` or `audit`."
        )
    board = Leaderboard([], [], [])
    for path in paths:
        where = str(path.parent.relative_to(folder))
        try:
            result = read_result(path.parent)
        except (HoldfastError, OSError) as error:
            board.damaged.append((where, str(error)))
            continue
        if result.audit is None:
            board.others.append((where, result.job))
        else:
            board.entries.append(Entry(where, result, result.audit))
    return board


def write_leaderboard(board: Leaderboard, path: Path) -> None:
    """Writes the page: one file that loads nothing from the network."""
    page = environment().get_template("leaderboard.html.j2").render(board=board, few_seeds=FEW_SEEDS)
    write_atomic(path, page)
