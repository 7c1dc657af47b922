"""The model card: a section for a model's README, with the audit's numbers and the hashes of the weights."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from holdfast.errors import HoldfastError
from holdfast.report import wording
from holdfast.report.sequential import looks
from holdfast.report.what_would_change import what_would_change
from holdfast.results import AuditResult, RunResult

BEGIN, END = "<!-- holdfast:begin -->", "<!-- holdfast:end -->"
META_BEGIN, META_END = "# holdfast:begin", "# holdfast:end"
TENSORS, FILE = "SHA-256 of the tensors", "SHA-256 of the file"

_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
_OWN_META = re.compile(rf"^{META_BEGIN}\n.*?^{META_END}\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Hashes:
    """The hashes of the weights that a card is about.

    Attributes:
        tensors: over names, dtypes, shapes and values.
        file: over the bytes of the file; None: not in the card.
    """

    tensors: str
    file: str | None


def card(result: RunResult, file_sha256: str | None = None) -> str:
    """Returns a complete README: front matter and the section.

    Args:
        result: a result with an audit.
        file_sha256: hash of the immunized model's file.

    Raises:
        HoldfastError: if there is no audit.
    """
    return put("", result, file_sha256)


def put(readme: str, result: RunResult, file_sha256: str | None = None) -> str:
    """Returns a README with the section in it; the text outside the markers stays as it is.

    An earlier section is replaced; otherwise the section is added at the end. In the front matter, keys that the README
    already has are not changed.

    Args:
        readme: may be empty.
        result: see `card`.
        file_sha256: see `card`.
    """
    own = _section(result, file_sha256)
    front, body = _with_front_matter(readme, result)
    if (BEGIN in body) != (END in body) or body.count(BEGIN) > 1 or body.find(END) < body.find(BEGIN):
        raise HoldfastError(f"The README has an odd set of markers; expected {BEGIN} once, and {END} once after it.")
    if BEGIN in body:
        before, _, rest = body.partition(BEGIN)
        return front + before + own + rest.partition(END)[2]
    return front + (f"{body.rstrip()}\n\n" if body.strip() else "") + own + "\n"


def hashes(readme: str) -> Hashes:
    """Returns the hashes in a card.

    Raises:
        HoldfastError: if there is no card, or it has no hash.
    """
    section = readme.partition(BEGIN)[2].partition(END)[0]
    tensors, file = (re.search(rf"\| {name} \| `([0-9a-f]{{64}})` \|", section) for name in (TENSORS, FILE))
    if tensors is None:
        raise HoldfastError(
            f"There is no card in it: no {TENSORS!r} between {BEGIN} and {END}. `holdfast card` makes one."
        )
    return Hashes(tensors[1], file[1] if file else None)


def _with_front_matter(readme: str, result: RunResult) -> tuple[str, str]:
    match = _FRONT.match(readme)
    theirs = _OWN_META.sub("", match[1]) if match else ""
    try:
        known = yaml.safe_load(theirs) or {}
    except yaml.YAMLError as error:
        raise HoldfastError(f"The README's front matter is not valid YAML: {error}") from error
    if not isinstance(known, dict):
        raise HoldfastError(
            "The README's front matter is not a mapping; expected `key: value` lines between two `---`."
        )
    ours = {key: value for key, value in _metadata(result).items() if key not in known}
    block = yaml.safe_dump(ours, sort_keys=False, allow_unicode=True, width=100) if ours else ""
    own = f"{META_BEGIN}\n{block}{META_END}\n" if block else ""
    return f"---\n{theirs}{own}---\n" + ("" if match else "\n"), readme[match.end() :] if match else readme


def _metadata(result: RunResult) -> dict[str, Any]:
    """The front matter, with Hugging Face's `model-index`: tasks, data, metrics."""
    audit = _audit(result)
    key = wording.key_numbers(audit)
    last = key.last.best["immunized"].mean
    advantage = key.worst.advantage if key.worst else None
    restricted = [
        _metric(audit.unit, f"Best adversary after {key.last.budget} steps of fine-tuning", last),
        _metric("advantage", f"Largest advantage over {audit.spoken.training_control}", advantage),
        _metric("retained", "Retained share of the original's advantage", audit.verdict.retained),
    ]
    benign = [_metric(audit.unit, "Benign score", audit.benign.immunized)]
    tasks = [("benign-task", "The model's own task", audit.benign_task, benign)]
    if audit.verdict.label != "invalid":  # an index must not list numbers of an invalid audit as results
        tasks.insert(0, ("fine-tuning-resistance", "Resistance to fine-tuning", audit.restricted_task, restricted))
    entries = [
        {
            "task": {"type": kind, "name": name},
            "dataset": {"type": data, "name": data},
            "metrics": [m for m in metrics if m is not None],
        }
        for kind, name, data, metrics in tasks
    ]
    index = {"name": result.title, "results": [entry for entry in entries if entry["metrics"]]}
    return {"tags": ["holdfast", "fine-tuning-resistance"], "model-index": [index]}


def _metric(kind: str, name: str, value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"type": kind, "name": name, "value": round(value, 4)}


def _audit(result: RunResult) -> AuditResult:
    if result.audit is None:
        raise HoldfastError(
            f"{result.title!r} was not audited (it is a result of {result.job!r}); a card needs an audit."
        )
    return result.audit


def _changes(audit: AuditResult) -> list[str]:
    lines = [f"- {_text(line)}" for line in what_would_change(audit)]
    return ["### What would change the verdict", "\n".join(lines)] if lines else []


def _section(result: RunResult, file_sha256: str | None) -> str:
    audit = _audit(result)
    verdict = audit.verdict
    parts = [
        BEGIN,
        "## Resistance to fine-tuning",
        f"**Verdict: {verdict.label}.** {_text(verdict.sentence)}",
        *(["\n".join(f"- {_text(reason)}" for reason in wording.reasons(audit))] if verdict.label == "invalid" else []),
        f"**{'What was tried' if verdict.label == 'invalid' else 'It holds for'}:** {_text(verdict.threat_model)}",
        _numbers(result, audit),
        *filter(None, [audit.spoken.note]),
        "### Red flags",
        "\n".join(f"- **{_text(f.name)}** ({f.severity}): {_text(f.found)} {_text(f.remedy)}" for f in audit.flags)
        or "No red flag was raised.",
        *_changes(audit),
        "### Not claimed",
        "\n".join(f"- {_text(line)}" for line in wording.not_covered(audit)),
        "### These weights, and how to check",
        _weights(result, file_sha256),
        END,
    ]
    return "\n\n".join(parts)


def _numbers(result: RunResult, audit: AuditResult) -> str:
    key, verdict = wording.key_numbers(audit), audit.verdict
    worst = key.worst
    rows = [
        ("Restricted task", _text(audit.restricted_task)),
        ("Benign task", _text(audit.benign_task)),
        (f"Benign {_text(audit.unit)}, before and after",
         f"{_known(wording.percent(audit.benign.original))}, {_known(wording.percent(audit.benign.immunized))}"),
        (f"Best adversary after {key.last.budget} steps",
         "; ".join(f"{role} {_known(wording.percent(cell.mean))}" for role, cell in key.last.best.items())),
        (f"Largest advantage over {_text(audit.spoken.training_control)}",
         "not finite" if worst is None else f"{wording.points(worst.advantage)} points after {worst.budget} steps"
         + _within(wording.span(worst.interval))),
        ("Retained of the original's advantage",
         _known(None if verdict.retained is None else f"{verdict.retained:.0%}")
         + _within(wording.share_span(verdict.retained_interval))),
        (f"Steps to the target score, against {_text(audit.spoken.control)}", _cost(audit)),
        *((f"Lost on a harmless task ({_text(e.task)}, {e.task_role})",
           f"{_known(wording.points(e.lost))} points" + _within(wording.span(e.interval))) for e in audit.side_effects),
        ("Battery", f"{_text(audit.battery)}: {len(audit.adversaries)} adversaries, {len(audit.seeds)} seeds, "
                    f"{audit.adversary_samples} samples, budgets {', '.join(map(str, audit.budgets))}"),
        ("Best adversary", f"{_text(wording.strongest(audit))}"),
        *([("Seeds", _text(staged))] if (staged := looks(audit)) is not None else []),
    ]  # fmt: skip
    if result.immunization is not None:
        rows.insert(0, ("Defense", _text(result.immunization.defense)))
    return _table(rows)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _weights(result: RunResult, file_sha256: str | None) -> str:
    origin = result.provenance
    if "immunized" not in origin.models:
        raise HoldfastError(f"The result of {result.title!r} does not say which weights were audited; it is damaged.")
    rows = [(TENSORS, f"`{origin.models['immunized'].sha256}`")]
    rows += [(FILE, f"`{file_sha256}`")] if file_sha256 else []
    rows += [("Holdfast", _text(f"{origin.holdfast}, {origin.started[:10]}"))]
    command = " ".join(map(_quoted, origin.command))
    return (
        f"{_table(rows)}\n\nThe audit describes these weights only. To check whether a file holds them, and to repeat "
        f"the audit:\n\n```console\n$ holdfast card README.md --check model.safetensors\n$ {command}\n```"
    )


def _quoted(argument: str) -> str:
    """Quotes an argument for a shell, on one line, so that it ends neither the code block nor the section."""
    if argument.isprintable() and "`" not in argument and "<" not in argument:
        return shlex.quote(argument)
    return "$'" + "".join(c if c.isalnum() or c in "-_./:=, " else f"\\U{ord(c):08x}" for c in argument) + "'"


def _cost(audit: AuditResult) -> str:
    by_role = {c.role: c.steps for c in audit.costs}
    if audit.cost_target is None or "immunized" not in by_role:
        return "not known"
    ratio = wording.cost_ratio(audit)
    steps = wording.amount(by_role["immunized"])
    times = "" if ratio is None else f", {ratio:.2g} times {_text(audit.spoken.control)}"
    return f"{steps} to {audit.cost_target:.1%}{times}"


def _within(interval: str | None) -> str:
    return "" if interval is None else f" (95%: {interval})"


def _known(text: str | None) -> str:
    return "not finite" if text is None else text


def _text(raw: str) -> str:
    """Escapes a text for Markdown and its tables."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(" ".join(raw.split()), quote=False))
