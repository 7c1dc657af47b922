"""The command line: `holdfast run | immunize | audit | feasibility | ...`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser

from holdfast.cli.base import Command, HelpFormatter, add_arguments
from holdfast.cli.commands import Attack, Audit, Feasibility, Immunize, Recipes, Run
from holdfast.cli.results import Card, Leaderboard, Replay, Report
from holdfast.errors import HoldfastError
from holdfast.runtime.launcher import processes
from holdfast.runtime.signals import Terminated, sigterm_raises

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143

COMMANDS: dict[str, type[Command]] = {
    "run": Run,
    "immunize": Immunize,
    "audit": Audit,
    "attack": Attack,
    "feasibility": Feasibility,
    "report": Report,
    "replay": Replay,
    "card": Card,
    "leaderboard": Leaderboard,
    "recipes": Recipes,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: parses, runs one command, and exits with its code; bad input gives a message, never a traceback."""
    words, arguments = list(sys.argv[1:] if argv is None else argv), dict[str, Any]()
    parser = _parser([word for word in words if not word.startswith("-")][:1])
    try:
        _refuse_empty(words)
        options = parser.parse_args(words)
        command = options.command
        arguments = options[command].as_dict()
        with sigterm_raises():
            code = _agreed(COMMANDS[command](**arguments)())
    except HoldfastError as error:
        code = _complain(str(error), BAD_INPUT)
    except KeyboardInterrupt as error:
        again = "the same command without --overwrite" if arguments.get("overwrite") else "the same command"
        what, code = ("Terminated", TERMINATED) if isinstance(error, Terminated) else ("Interrupted", INTERRUPTED)
        _complain(f"{what}. Finished results are kept; {again} continues from there.", code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _complain(f"{error.strerror or error}" + (f": {error.filename!r}" if error.filename else ""), BAD_INPUT)
    except Exception as error:
        if os.environ.get("HOLDFAST_TRACEBACK"):
            raise
        code = _complain(
            f"unexpected {type(error).__name__}: {error}\nThis is a bug: please report it. Finished results are kept. "
            "HOLDFAST_TRACEBACK=1 shows where it happened.",
            BAD_INPUT,
        )
    sys.exit(code)


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuses `--out ""`, most often an unset shell variable; as a path it would be the current folder."""
    for option, value in zip(words, [*words[1:], None], strict=True):
        if (option.startswith("--") and value == "") or (option.startswith("--") and option.endswith("=")):
            raise HoldfastError(f"{option.rstrip('=')} is empty; give it a value, or leave it out.")


def _agreed(code: int) -> int:
    """Makes launched processes exit together: the launcher stops all as soon as one exits with another code than 0."""
    if processes() == 1:  # before the import: some commands do not need torch
        return code
    from holdfast.runtime.distributed import process_group

    return process_group().broadcast_object(code)


def _parser(wanted: Sequence[str] = tuple(COMMANDS)) -> ArgumentParser:
    """Makes the parser; only the wanted commands get options, since adding them takes time."""
    parser = ArgumentParser(
        prog="holdfast",
        description="Immunize open-weight models against harmful fine-tuning, and audit honestly whether it worked.",
        epilog="Begin with: holdfast run quickstart",
        version=version("holdfast"),
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subcommands(dest="command", title="commands")
    for name, command in COMMANDS.items():
        text = inspect.getdoc(command) or ""
        sub = ArgumentParser(description=" ".join(text.split()), formatter_class=HelpFormatter)
        if name in wanted:
            add_arguments(sub, command)
        commands.add_subcommand(name, sub, help=text.split("\n\n")[0].replace("\n", " "))
    return parser


def _complain(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # each of several processes names its own error
    print(f"holdfast{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
