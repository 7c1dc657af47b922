"""The command line: `holdfast run | immunize | audit | feasibility | ...`, generated from the signatures below."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from holdfast.cli.results import card_command, leaderboard_command, replay_command, report_command
from holdfast.errors import HoldfastError, unknown
from holdfast.runtime.launcher import processes
from holdfast.runtime.signals import Terminated, sigterm_raises

RESISTS, BAD_INPUT, DOES_NOT_RESIST, INVALID, INTERRUPTED, TERMINATED = 0, 2, 3, 4, 130, 143
NOT_IMMUNIZED = DOES_NOT_RESIST


def run_command(
    recipe: str,
    out: Path | None = None,
    scale: Literal["smoke", "cpu", "paper"] = "cpu",
    seed: int | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    gate: bool = False,
    executor: str = "serial",
    *,
    set: Sequence[str] = (),
    reuse: Sequence[Path] = (),
    track: str | None = None,
) -> int:
    """Run a recipe: load a model, immunize it, audit it, write the report; or a study, or a protocol of attacks.

    If the folder already holds a part of this very job, only what is missing is done. Ctrl-C is safe at any time.

    Args:
        recipe: Name of a packaged recipe (see `holdfast recipes`), or a YAML file.
        out: Folder for result.json, report.html, model.safetensors and checkpoints/ (default: runs/RECIPE).
        scale: smoke (seconds), cpu (two cores) or paper (the full setting, for a GPU), if the recipe has it.
        seed: Replaces the recipe's seed.
        data_dir: Where NAME.npz, NAME.csv, image folders and weights are looked up (default: $HOLDFAST_DATA).
        device: auto, cpu, cuda, cuda:1, mps, ...
        overwrite: Throw away what an earlier run left in the folder.
        gate: Exit as `holdfast audit` does: 0 resists, 3 does not, 4 invalid.
        executor: Where trials run: serial, processes[:N], ray[:N] or ray://HOST:PORT; same results.
        set: Override a setting of the recipe, such as defense.iterations=50; may be repeated.
        reuse: Folder of another protocol's run: take from it the immunized models that are wanted; may be repeated.
        track: Log rounds and trials to tensorboard, wandb, mlflow or trackio, whose package must be installed.
    """
    from holdfast import api
    from holdfast.experiments.recipe import Recipe, load
    from holdfast.report.terminal import show

    loaded = load(recipe, scale=scale, overrides=set, seed=seed)
    if gate and not isinstance(loaded, Recipe):
        raise HoldfastError(f"--gate: a {loaded.kind} has no verdict to exit with; leave it out.")
    folder = out or Path("runs") / (Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe)
    with _tracked(track, folder) as callbacks:
        result = api.run(
            loaded, folder=folder, data_dir=data_dir, device=device, overwrite=overwrite, quiet=False,
            executor=executor, reuse=reuse, callbacks=callbacks,
        )  # fmt: skip
    show(result, folder)
    return _exit_code(result.audit.verdict.label if result.audit else None) if gate else 0


def immunize_command(
    model: str,
    benign: str,
    restricted: str,
    out: Path,
    weights: Path | None = None,
    head: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    defense: str = "sophon",
    seed: int = 0,
    data_dir: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    *,
    set: Sequence[str] = (),
    track: str | None = None,
) -> int:
    """Immunize a model, and write it to OUT/model.safetensors.

    Exits with 3 if nothing was immunized: the defense gave up, and the weights are the original's, or not finite.

    Uses the defender's half of the restricted training data; `holdfast audit` gives its adversaries the other half.

    Args:
        model: A model.safetensors that Holdfast saved; a folder of a diffusers pipeline (or diffusers:NAME), timm:NAME
            or hf:NAME, with its own weights unless others are given; file.py:function or module:function, which runs
            that code; or an architecture (such as cnn or cifar_resnet) with --weights.
        benign: What it must stay good at: digits[0-4], cifar10, x.npz, images/@image_size=32, t.csv@target=label, ...
        restricted: What it must not be fine-tuned to; named like `benign`.
        out: Folder for model.safetensors, result.json, report.html and checkpoints/; of a denoiser also pipeline/.
        weights: Weights (.safetensors), where MODEL is a name.
        head: Dotted name of the layer that makes the logits, where another than the one found is meant.
        mean: Subtracted from images in [0, 1], such as 0.485,0.456,0.406, where another is meant than MODEL's own.
        std: Divides them afterwards, such as 0.229,0.224,0.225.
        defense: Name of the defense.
        seed: Of everything random.
        data_dir: Where data and weights are looked up (default: $HOLDFAST_DATA).
        device: auto, cpu, cuda, cuda:1, mps, ...
        threads: CPU threads; 1 is best for small networks (default: torch's own choice).
        set: Set a hyper-parameter of the defense, such as iterations=50; may be repeated.
        track: Log rounds to tensorboard, wandb, mlflow or trackio, whose package must be installed.
    """
    from holdfast import api
    from holdfast.defenses import DEFENSES
    from holdfast.defenses.registry import build_defense
    from holdfast.experiments.recipe import read_overrides
    from holdfast.models import load_released, load_task_for
    from holdfast.report.terminal import show
    from holdfast.results import read_result
    from holdfast.runtime.distributed import speaks

    values = read_overrides(set)
    if "name" in values:
        raise HoldfastError(f"--set name={values['name']}: the defense is chosen with --defense.")
    kind = DEFENSES.get(defense)
    known = () if kind is None else [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    _refuse_options(immunize_command, values, known)
    chosen = build_defense({"name": defense, **values})
    task, against = (load_task_for(named, model, data_dir=data_dir) for named in (benign, restricted))
    original = load_released(
        model, weights, task, head=head, mean=_numbers(mean, "--mean"), std=_numbers(std, "--std"), data_dir=data_dir
    )
    with _tracked(track, out) as callbacks:
        api.immunize(
            original, benign=task, restricted=against, defense=chosen, seed=seed, device=device, threads=threads,
            folder=out, quiet=False, callbacks=callbacks,
        )  # fmt: skip
    record = read_result(out).immunization
    assert record is not None
    if speaks():
        show(read_result(out), out)
        print(f"{'Model' if record.nothing else 'Immunized model'}: {out / 'model.safetensors'}")
    return NOT_IMMUNIZED if record.nothing else 0


def audit_command(
    model: str,
    original: str,
    benign: str,
    restricted: str,
    out: Path,
    transfer: str | None = None,
    weights: Path | None = None,
    original_weights: Path | None = None,
    head: str | None = None,
    original_head: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    original_mean: str | None = None,
    original_std: str | None = None,
    battery: str = "quick-v1",
    budgets: str = "0,5,10,20,50,100",
    seeds: int = 5,
    shots: int | None = None,
    trials: int | None = None,
    reported: float | None = None,
    reported_benign: float | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    executor: str = "serial",
    *,
    set: Sequence[str] = (),
    track: str | None = None,
) -> int:
    """Audit a model against its original and against training from scratch; a gate for CI.

    Exits with 0 if the model resists, 3 if it does not (partial, fails), 4 if the audit is invalid, 2 on bad input.

    Args:
        model: The model in question: a model.safetensors that Holdfast saved; a folder of a diffusers pipeline (or
            diffusers:NAME), timm:NAME or hf:NAME, with its own weights unless others are given; file.py:function or
            module:function, which runs that code; or an architecture (such as cnn or cifar_resnet) with --weights.
        original: What it was before it was immunized, given like MODEL.
        benign: Its own task: digits[0-4], cifar10, x.npz, images/@image_size=32, t.csv@target=label, ...
        restricted: The task that it must not be fine-tuned to; named like `benign`.
        transfer: A harmless task that it should still learn as well as the original does; named like `benign`.
        out: Folder for result.json, report.html and finished trials.
        weights: Weights of the model (.safetensors), where MODEL is a name.
        original_weights: The same for ORIGINAL.
        head: Dotted name of the layer of MODEL that makes the logits, where another than the one found is meant.
        original_head: The same for ORIGINAL.
        mean: Subtracted from images in [0, 1], such as 0.485,0.456,0.406, where another is meant than MODEL's own.
        std: Divides them afterwards, such as 0.229,0.224,0.225.
        original_mean: The same for ORIGINAL.
        original_std: The same for ORIGINAL.
        battery: Which adversaries: quick-v1, standard-v1, probes-v1, generation-v1, language-v1, or the search
            adaptive-v1.
        budgets: Fine-tuning steps at which they are scored; the first is 0.
        seeds: Repetitions.
        shots: Adversary's training samples a class; null: its whole half.
        trials: Of the search adaptive-v1, for each model (default: 48); other batteries have none.
        reported: Restricted score after the last budget that the publisher claims, such as 0.23; for comparison.
        reported_benign: Benign score of ORIGINAL that its publisher claims, such as 0.92; if it is far below, the audit
            says so first, and is invalid.
        seed: Of everything random.
        data_dir: Where data and weights are looked up (default: $HOLDFAST_DATA).
        device: auto, cpu, cuda, cuda:1, mps, ...
        threads: CPU threads; 1 is best for small networks (default: torch's own choice).
        executor: Where trials run: serial, processes[:N], ray[:N] or ray://HOST:PORT; same results. N is cores /
            threads.
        set: Set a threshold of the verdict, such as max_advantage=0.03, or side_effects or stacked; may be repeated.
        track: Log trials to tensorboard, wandb, mlflow or trackio, whose package must be installed.
    """
    from holdfast import api
    from holdfast.experiments.recipe import read_overrides
    from holdfast.models import load_released, load_task_for
    from holdfast.report.terminal import show
    from holdfast.results import read_result

    limits, more = _audit_settings(read_overrides(set))
    if trials is not None:
        more["trials"] = trials
    task, against = (load_task_for(named, original, data_dir=data_dir) for named in (benign, restricted))
    released = load_released(
        model, weights, task, head=head, mean=_numbers(mean, "--mean"), std=_numbers(std, "--std"), data_dir=data_dir
    )
    before = load_released(
        original, original_weights, task, head=original_head, mean=_numbers(original_mean, "--original-mean"),
        std=_numbers(original_std, "--original-std"), data_dir=data_dir,
    )  # fmt: skip
    harmless = None if transfer is None else load_task_for(transfer, original, data_dir=data_dir)
    source = {
        "model": model, "weights": _text(weights), "head": head, "original": original,
        "original_weights": _text(original_weights), "original_head": original_head, "mean": mean, "std": std,
        "original_mean": original_mean, "original_std": original_std, "benign": benign, "restricted": restricted,
        "transfer": transfer,
    }  # fmt: skip
    with _tracked(track, out) as callbacks:
        api.audit(
            released, original=before, benign=task, restricted=against, transfer=harmless, seed=seed, device=device,
            threads=threads, folder=out, quiet=False, battery=battery, budgets=_integers(budgets), seeds=seeds,
            shots=shots, reported=reported, reported_benign=reported_benign, thresholds=limits, executor=executor,
            source=source, callbacks=callbacks, **more,
        )  # fmt: skip
    result = read_result(out)
    show(result, out)
    return _exit_code(result.audit.verdict.label if result.audit else None)


def feasibility_command(
    model: str | None = None,
    *,
    benign: str,
    restricted: str,
    out: Path,
    weights: Path | None = None,
    head: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    ridge: float = 0.01,
    q: float = 0.9,
    data_dir: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> int:
    """Tell from spectra alone whether a linear extractor can immunize a model, by how much, and at what benign cost.

    Nothing is trained. Uses the defender's half of the restricted training data.

    Args:
        model: Named as for `holdfast audit`; a pretrained one need not know the benign task's classes. Left out: the
            inputs themselves.
        benign: What should stay easy to learn: digits[0-4], cifar10, x.npz, t.csv@target=price,kind=regression, ...
        restricted: What should become hard to learn; named like `benign`.
        out: Folder for result.json and report.html.
        weights: Weights (.safetensors), where MODEL is a name.
        head: Dotted name of the layer that makes the logits, where another than the one found is meant.
        mean: Subtracted from images in [0, 1], such as 0.485,0.456,0.406, where another is meant than MODEL's own.
        std: Divides them afterwards, such as 0.229,0.224,0.225.
        ridge: Per sample, for the bound on features that one of the tasks does not use.
        q: Share of the removable loss in the predicted number of steps.
        data_dir: Where data and weights are looked up (default: $HOLDFAST_DATA).
        device: auto, cpu, cuda, cuda:1, mps, ...
        threads: CPU threads (default: torch's own choice).
    """
    from holdfast import api
    from holdfast.models import load_released, load_task_for
    from holdfast.report.terminal import show
    from holdfast.results import read_result

    task, against = (load_task_for(named, model, data_dir=data_dir) for named in (benign, restricted))
    alone = [o for o, v in (("weights", weights), ("head", head), ("mean", mean), ("std", std)) if v is not None]
    if model is None and alone:
        raise HoldfastError(f"--{alone[0]} is of a model, and no MODEL is named; name it, such as cifar_resnet.")
    named = None if model is None else load_released(
        model, weights, task, head=head, mean=_numbers(mean, "--mean"), std=_numbers(std, "--std"), own_head=False,
        data_dir=data_dir,
    )  # fmt: skip
    api.feasibility(
        task, against, model=named, ridge=ridge, q=q, device=device, threads=threads, folder=out, quiet=False
    )
    show(read_result(out), out)
    return 0


def recipes_command(name: str | None = None) -> int:
    """List the recipes that come with Holdfast, or print one.

    Args:
        name: Print this recipe's YAML, as a start for one of your own.
    """
    from importlib.resources import files

    from rich.console import Console
    from rich.table import Table

    from holdfast.runtime.documents import read_yaml, recipe_names

    if name is not None:
        from holdfast.experiments.recipe import load  # with torch, which a list does not wait for

        load(name)
        print((files("holdfast") / "recipes" / f"{name}.yaml").read_text(), end="")
        return 0
    table = Table("recipe", "scales", "about")
    for each in recipe_names():
        content = read_yaml((files("holdfast") / "recipes" / f"{each}.yaml").read_text(), f"Recipe {each!r}")
        table.add_row(
            each,
            ", ".join(sorted({"cpu", *content.get("scales", {})})),
            content.get("about", content["title"]),
        )
    Console().print(table)
    return 0


# The functions are not named like the package's verbs: jsonargparse would look those up, and wait for torch.
COMMANDS: dict[str, Callable[..., int]] = {
    "run": run_command,
    "immunize": immunize_command,
    "audit": audit_command,
    "feasibility": feasibility_command,
    "report": report_command,
    "replay": replay_command,
    "card": card_command,
    "leaderboard": leaderboard_command,
    "recipes": recipes_command,
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
            code = _agreed(COMMANDS[command](**arguments))
    except HoldfastError as error:
        code = _complain(str(error), BAD_INPUT)
    except KeyboardInterrupt as error:
        again = "the same command without --overwrite" if arguments.get("overwrite") else "the same command"
        what, code = ("Terminated", TERMINATED) if isinstance(error, Terminated) else ("Interrupted", INTERRUPTED)
        _complain(f"{what}. What is finished is kept; {again} continues from there.", code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _complain(f"{error.strerror or error}" + (f": {error.filename!r}" if error.filename else ""), BAD_INPUT)
    except Exception as error:
        if os.environ.get("HOLDFAST_TRACEBACK"):
            raise
        code = _complain(
            f"unexpected {type(error).__name__}: {error}\nThis input should have been refused with a "
            "reason: please report it. What was finished before is kept. HOLDFAST_TRACEBACK=1 shows where it happened.",
            BAD_INPUT,
        )
    sys.exit(code)


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuses `--out ""`: most often a shell variable that is not set, and as a path it would be the present folder."""
    for option, value in zip(words, [*words[1:], None], strict=True):
        if (option.startswith("--") and value == "") or (option.startswith("--") and option.endswith("=")):
            raise HoldfastError(f"{option.rstrip('=')} is empty; give it a value, or leave it out.")


def _agreed(code: int) -> int:
    """Lets several processes end together: a launcher ends all as soon as one of them ends with another code than 0."""
    if processes() == 1:  # do not wait for torch where a command did not
        return code
    from holdfast.runtime.distributed import process_group

    return process_group().broadcast_object(code)


class _HelpFormatter(DefaultHelpFormatter):
    """Leaves out what a person at the terminal does not need: Python types, and defaults that are None."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, [])
        return f"{text} (default: {action.default})" if shown else text


def _parser(wanted: Sequence[str] = tuple(COMMANDS)) -> ArgumentParser:
    """Makes the parser; only the commands that are wanted get their options, which take a while to make."""
    parser = ArgumentParser(
        prog="holdfast",
        description="Immunize open-weight models against harmful fine-tuning, and audit honestly whether it worked.",
        epilog="Begin with: holdfast run quickstart",
        version=_version(),
        formatter_class=_HelpFormatter,
    )
    commands = parser.add_subcommands(dest="command", title="commands")
    for name, function in COMMANDS.items():
        described = parse_docstring(function.__doc__ or "")
        text = " ".join(filter(None, (described.short_description, described.long_description)))
        sub = ArgumentParser(description=" ".join(text.split()), formatter_class=_HelpFormatter)
        if name in wanted:
            _add_arguments(sub, function, {p.arg_name: p.description or "" for p in described.params})
        commands.add_subcommand(name, sub, help=described.short_description)
    return parser


REPEATED = {"set": "KEY=VALUE", "reuse": "FOLDER"}
"""Options that may be given several times, and what their value is."""


def _add_arguments(parser: ArgumentParser, function: Callable[..., int], help_of: dict[str, str]) -> None:
    """Adds a signature: the first parameter is positional, flags take no value, and `REPEATED` may be repeated."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    special: set[int | str] = {p.name for p in parameters if p.annotation is bool or p.name in REPEATED}
    first = next(iter(parameters))
    for p in parameters:
        if p.annotation is bool:
            parser.add_argument(f"--{p.name}", action="store_true", help=help_of[p.name])
        elif p.name in REPEATED:
            shown, text = REPEATED[p.name], help_of[p.name]
            parser.add_argument(f"--{p.name}", action="append", default=[], metavar=shown, help=text)
    if first.default is first.empty:
        parser.add_argument(first.name, type=first.annotation, help=help_of[first.name])
    else:
        parser.add_argument(
            first.name, type=first.annotation, nargs="?", default=first.default, help=help_of[first.name]
        )
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=special | {first.name})
    for action in parser._actions:
        # As people spell options, `--data-dir`; the signature's own spelling works as well.
        for option in [o for o in action.option_strings if "_" in o]:
            dashed = option.replace("_", "-")
            parser._option_string_actions[dashed] = action
            action.option_strings = [dashed if o == option else o for o in action.option_strings]


def _version() -> str:
    from importlib.metadata import version

    return version("holdfast")


def _audit_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sorts what `audit --set` was given: thresholds, and settings of an audit that have no option of their own."""
    from holdfast.auditing.audit import AuditSpec
    from holdfast.results import Thresholds

    options = inspect.signature(audit_command).parameters
    settable = [key for key in AuditSpec.model_fields if key not in options and key != "thresholds"]
    bare = {key.removeprefix("thresholds."): value for key, value in values.items()}
    if len(bare) < len(values):
        raise HoldfastError("--set names a threshold twice, with and without `thresholds.`; keep one.")
    _refuse_options(audit_command, bare, [*Thresholds.model_fields, *settable])
    for key in bare:
        if key not in Thresholds.model_fields and key not in settable:
            raise unknown("setting for --set:", key, [*Thresholds.model_fields, *settable])
    limits = {key: value for key, value in bare.items() if key in Thresholds.model_fields}
    return limits, {key: value for key, value in bare.items() if key in settable}


def _refuse_options(command: Callable[..., int], values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Says which option sets what `--set` does not."""
    options = [name for name in inspect.signature(command).parameters if name != "set"]
    for key in values:
        name = key.replace("-", "_")
        if key not in known and name in options:
            raise HoldfastError(f"--set {key}: it has an option of its own, --{name.replace('_', '-')}.")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(","))
    except ValueError as error:
        raise HoldfastError(f"--budgets {text!r}: expected whole numbers with commas, such as 0,10,20.") from error


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError as error:
        raise HoldfastError(f"{option} {text!r}: expected numbers with commas, such as 0.485,0.456,0.406.") from error


@contextlib.contextmanager
def _tracked(name: str | None, folder: Path) -> Iterator[list[Any]]:
    """Yields the callbacks of a command: a tracker, if one is wanted; it writes below the command's folder."""
    if name is None:
        yield []
        return
    from holdfast.runtime.callbacks import Tracker

    with Tracker(name, folder.name, folder / "tracking") as tracker:
        yield [tracker]


def _exit_code(label: str | None) -> int:
    return {"resists": RESISTS, "partial": DOES_NOT_RESIST, "fails": DOES_NOT_RESIST}.get(label or "", INVALID)


def _complain(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # of several processes, each says what stopped it
    print(f"holdfast{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
