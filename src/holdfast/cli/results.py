"""The commands on finished folders: report, replay, card and leaderboard."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from holdfast.cli.base import Command, argument, option
from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from holdfast.results import RunResult

SAME, NOT_THE_SAME = 0, 1


@dataclass(kw_only=True)
class Report(Command):
    """Write a run's report.html anew from its result.json, and print the verdict."""

    folder: Path = argument("A folder that `holdfast run`, `immunize`, `audit` or `feasibility` completed.")

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast.report import write_report
        from holdfast.report.terminal import show
        from holdfast.results import read_result

        result = read_result(self.folder)
        write_report(result, self.folder / "report.html")
        show(result, self.folder)
        return 0


@dataclass(kw_only=True)
class Replay(Command):
    """Repeat one trial of a finished run or audit, and compare its scores with those that were recorded.

    Exits with 0 if every score is the same to the last digit, 1 if not. Other weights or other data than those of the
    audit are refused.
    """

    folder: Path = argument("A folder that `holdfast run` or `holdfast audit` completed.")
    adversary: str | None = option("Name of the adversary (default: the best one on the immunized model).", None)
    role: Literal["immunized", "original", "scratch"] = option("Which model it attacks.", "immunized")
    seed: int = option("Which repetition.", 0)
    data_dir: Path | None = option("Where data and weights are looked up (default: $HOLDFAST_DATA).", None)
    device: str | None = option("auto, cpu, cuda, cuda:1, mps, ... (default: the recorded one).", None)
    threads: int | None = option("CPU threads (default: as many as were recorded).", None)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast.experiments.replay import replay
        from holdfast.report.terminal import show_replay

        done = replay(
            self.folder, adversary=self.adversary, role=self.role, seed=self.seed, data_dir=self.data_dir,
            device=self.device, threads=self.threads,
        )  # fmt: skip
        show_replay(done.recorded, done.repeated)
        return SAME if done.same else NOT_THE_SAME


@dataclass(kw_only=True)
class Card(Command):
    """Print a model card's section on an audit, bound to the audited weights; or check that a card is of these weights.

    With --check, exits with 0 if the weights are the card's, 1 if not.
    """

    folder: Path = argument(
        "A folder that `holdfast run` or `holdfast audit` completed; with --check, the README.md with the card."
    )
    out: Path | None = option(
        "README.md to put the section into; what stands outside of the section's markers is kept.", None
    )
    weights: Path | None = option(
        "The released file (default: FOLDER/model.safetensors, or the file that was audited).", None
    )
    check: Path | None = option("A .safetensors file: is the card about it?", None)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast.report import model_card
        from holdfast.results import read_result
        from holdfast.runtime.storage import write_atomic

        folder, out = self.folder, self.out
        if self.check is not None:
            idle = [name for name, given in (("--out", out), ("--weights", self.weights)) if given is not None]
            if idle:
                raise HoldfastError(f"{idle[0]} does nothing beside --check, which only compares; leave it out.")
            return _check_card(folder / "README.md" if folder.is_dir() else folder, self.check)
        result = read_result(folder)
        file_sha256 = _bind(result, folder, self.weights)
        if out is None:
            print(model_card.card(result, file_sha256), end="")
            return 0
        readme = out.read_text(encoding="utf-8") if out.exists() else ""
        write_atomic(out, model_card.put(readme, result, file_sha256))
        print(f"Card: {out}")
        return 0


@dataclass(kw_only=True)
class Leaderboard(Command):
    """Render all audits under a folder as one page, side by side: measured, reported, and what is unreliable."""

    folder: Path = argument("It and its subfolders are searched.")
    out: Path | None = option("The page (default: FOLDER/leaderboard.html).", None)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast.report.leaderboard import collect, write_leaderboard

        board, path = collect(self.folder), self.out or self.folder / "leaderboard.html"
        write_leaderboard(board, path)
        print(f"{len(board.entries)} with an audit, {len(board.others)} without, {len(board.damaged)} not readable")
        print(f"Leaderboard: {path}")
        return 0


def _bind(result: RunResult, folder: Path, weights: Path | None) -> str | None:
    """Returns the hash of the released file, which must hold the very tensors that were audited."""
    from holdfast.runtime.storage import load_tensors, tensors_sha256

    if "immunized" not in result.provenance.models:
        raise HoldfastError(f"{str(folder)!r} holds no immunized model (its kind is {result.job!r}).")
    source = result.recipe.get("source") or {}
    named = [source.get("weights"), source.get("model")]
    places = [weights] if weights else [folder / "model.safetensors", *(Path(n) for n in named if n)]
    for path in places:
        if path is weights or (path.suffix == ".safetensors" and path.is_file()):
            now, then = tensors_sha256(load_tensors(path)[0]), result.provenance.models["immunized"].sha256
            if now != then:
                raise HoldfastError(
                    f"{str(path)!r} holds other tensors than were audited (SHA-256 {now[:12]}... instead of "
                    f"{then[:12]}...). Give the file that is released with --weights, or audit this one."
                )
            return _file_sha256(path)
    print("holdfast: no file of the weights is at hand, so the card names their tensors only; --weights FILE adds it.",
          file=sys.stderr)  # fmt: skip
    return None


def _check_card(readme: Path, weights: Path) -> int:
    from holdfast.report.model_card import hashes
    from holdfast.runtime.storage import load_tensors, tensors_sha256

    if not readme.is_file():
        raise HoldfastError(f"No card at {str(readme)!r}: the file does not exist.")
    claimed = hashes(readme.read_text(encoding="utf-8"))
    found = tensors_sha256(load_tensors(weights)[0])
    if found != claimed.tensors:
        print(f"NOT the card of {weights}: its tensors are {found}, and the card is about {claimed.tensors}.")
        return NOT_THE_SAME
    print(f"The card is about the tensors of {weights}: {found}.")
    if claimed.file is not None and claimed.file != _file_sha256(weights):
        print("The file was written anew: its bytes are others, its tensors are the same.")
    return SAME


def _file_sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
