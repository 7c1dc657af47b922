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
    """Write a run's report.html again from its result.json, and print the verdict."""

    folder: Path = argument("Folder of a finished `holdfast run`, `immunize`, `audit` or `feasibility`.")

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
    """Repeat one trial of a finished run or audit, and compare its scores with the recorded ones.

    Exits with 0 if every score is the same to the last digit, 1 if not. Other weights or other data than those of the
    audit are refused.
    """

    folder: Path = argument("Folder of a finished `holdfast run` or `holdfast audit`.")
    adversary: str | None = option("Name of the adversary (default: the best one on the immunized model).", None)
    role: Literal["immunized", "original", "scratch"] = option("The model that it attacks.", "immunized")
    seed: int = option("Number of the repetition.", 0)
    data_dir: Path | None = option("Folder with data and weights (default: $HOLDFAST_DATA).", None)
    device: str | None = option("auto, cpu, cuda, cuda:1, mps, ... (default: the recorded one).", None)
    threads: int | None = option("CPU threads (default: the recorded number).", None)

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
    """Print a model card's section on an audit, with the hashes of the weights; or check a card against weights.

    With --check, exits with 0 if the card has the hash of the weights, 1 if not.
    """

    folder: Path = argument(
        "Folder of a finished `holdfast run` or `holdfast audit`; with --check, the README.md with the card."
    )
    out: Path | None = option(
        "README.md to write the section to; the text outside the section's markers is kept.", None
    )
    weights: Path | None = option(
        "The released file (default: FOLDER/model.safetensors, or the file that was audited).", None
    )
    check: Path | None = option("A .safetensors file to check the card against.", None)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast.report import model_card
        from holdfast.results import read_result
        from holdfast.runtime.storage import write_atomic

        folder, out = self.folder, self.out
        if self.check is not None:
            unused = [name for name, value in (("--out", out), ("--weights", self.weights)) if value is not None]
            if unused:
                raise HoldfastError(f"{unused[0]} has no effect with --check, which only compares; leave it out.")
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
    """Show all audits under a folder on one page: measured and reported scores, and which audits are unreliable."""

    folder: Path = argument("Folder to search, with its subfolders.")
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
    """Returns the hash of the released file, after checking that it holds the audited tensors."""
    from holdfast.runtime.storage import load_tensors, tensors_sha256

    if "immunized" not in result.provenance.models:
        raise HoldfastError(f"{str(folder)!r} holds no immunized model (its kind is {result.job!r}).")
    source = result.recipe.get("source") or {}
    names = [name for name in (source.get("weights"), source.get("model")) if name]
    for path in [weights] if weights else [folder / "model.safetensors", *map(Path, names)]:
        if path is weights or (path.suffix == ".safetensors" and path.is_file()):
            now, then = tensors_sha256(load_tensors(path)[0]), result.provenance.models["immunized"].sha256
            if now != then:
                raise HoldfastError(
                    f"{str(path)!r} holds other tensors than were audited (SHA-256 {now[:12]}... instead of "
                    f"{then[:12]}...). Give the file that is released with --weights, or audit this one."
                )
            return _file_sha256(path)
    print("holdfast: the file of the weights was not found, so the card has the hash of their tensors only; --weights "
          "FILE adds that of the file.", file=sys.stderr)  # fmt: skip
    return None


def _check_card(readme: Path, weights: Path) -> int:
    from holdfast.report.model_card import hashes
    from holdfast.runtime.storage import load_tensors, tensors_sha256

    if not readme.is_file():
        raise HoldfastError(f"No card at {str(readme)!r}: the file does not exist.")
    claimed = hashes(readme.read_text(encoding="utf-8"))
    measured = tensors_sha256(load_tensors(weights)[0])
    if measured != claimed.tensors:
        print(f"NOT the card of {weights}: its tensors are {measured}, and the card is about {claimed.tensors}.")
        return NOT_THE_SAME
    print(f"The card is about the tensors of {weights}: {measured}.")
    if claimed.file is not None and claimed.file != _file_sha256(weights):
        print("The file was written again: its bytes differ, its tensors are the same.")
    return SAME


def _file_sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
