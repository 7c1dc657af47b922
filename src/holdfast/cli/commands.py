"""The commands that compute: run, immunize, audit and feasibility; and the list of recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from holdfast.cli.base import Command, ComputeOptions, ModelOptions, TrackOption, argument, option, repeated
from holdfast.errors import HoldfastError, unknown

RESISTS, DOES_NOT_RESIST, INVALID = 0, 3, 4
NOT_IMMUNIZED = DOES_NOT_RESIST

SOURCES = """a model.safetensors that Holdfast saved; a folder of a diffusers pipeline (or diffusers:NAME), timm:NAME or
hf:NAME, with its own weights unless others are given; file.py:function or module:function, which runs that code; or an
architecture (such as cnn or cifar_resnet) with --weights."""
TASKS = "digits[0-4], cifar10, x.npz, images/@image_size=32, t.csv@target=label, ..."
EXECUTORS = "serial, processes[:N], ray[:N] or ray://HOST:PORT; same results. N is cores / threads."


@dataclass(kw_only=True)
class Run(TrackOption, Command):
    """Run a recipe: load a model, immunize it, audit it, write the report; or a study, or a protocol of attacks.

    If the folder already holds a part of this job, only the missing part is computed. Ctrl-C is safe at any time.
    """

    recipe: str = argument("Name of a packaged recipe (see `holdfast recipes`), or a YAML file.")
    out: Path | None = option(
        "Folder for result.json, report.html, model.safetensors and checkpoints/ (default: runs/RECIPE).", None
    )
    scale: Literal["smoke", "cpu", "paper"] = option(
        "smoke (seconds), cpu (two cores) or paper (the full setting, for a GPU), if the recipe has it.", "cpu"
    )
    set: Sequence[str] = repeated(
        "Override a setting of the recipe, such as defense.iterations=50; may be repeated.", "KEY=VALUE"
    )
    seed: int | None = option("Replaces the recipe's seed.", None)
    data_dir: Path | None = option(
        "Folder with NAME.npz, NAME.csv, image folders and weights (default: $HOLDFAST_DATA).", None
    )
    device: str = option("auto, cpu, cuda, cuda:1, mps, ...", "auto")
    executor: str = option(f"Where jobs run: {EXECUTORS}", "serial")
    reuse: Sequence[Path] = repeated(
        "Folder of another protocol's run: copy the immunized models that are needed here; may be repeated.",
        "FOLDER",
    )
    overwrite: bool = option("Delete the results of an earlier run in the folder.", False)
    gate: bool = option("Exit as `holdfast audit` does: 0 resists, 3 does not, 4 invalid.", False)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast.experiments.recipe import Recipe, load
        from holdfast.experiments.runner import default_folder, run_recipe
        from holdfast.report.terminal import show

        recipe = load(self.recipe, scale=self.scale, overrides=self.set, seed=self.seed)
        if self.gate and not isinstance(recipe, Recipe):
            raise HoldfastError(f"--gate: a {recipe.job} has no verdict; leave it out.")
        folder = self.out or default_folder(self.recipe)
        with self.callbacks(folder) as callbacks:
            result = run_recipe(
                recipe, folder=folder, data_dir=self.data_dir, device=self.device, overwrite=self.overwrite,
                quiet=False, executor=self.executor, reuse=self.reuse, callbacks=callbacks,
            )  # fmt: skip
        show(result, folder)
        return exit_code(result.audit.verdict.label if result.audit else None) if self.gate else 0


@dataclass(kw_only=True)
class Immunize(TrackOption, ComputeOptions, ModelOptions, Command):
    """Immunize a model, and write it to OUT/model.safetensors.

    Exits with 3 if nothing was immunized: the weights are still the original's, or not finite.

    Uses the defender's half of the restricted training data; `holdfast audit` gives its adversaries the other half.
    """

    model: str = argument(SOURCES[:1].upper() + SOURCES[1:])
    benign: str = option(f"The task that it must stay good at: {TASKS}")
    restricted: str = option("The task that it must not be fine-tuned to; named like `benign`.")
    out: Path = option(
        "Folder for model.safetensors, result.json, report.html and checkpoints/; for a denoiser also pipeline/."
    )
    defense: str = option("Name of the defense.", "sophon")
    set: Sequence[str] = repeated(
        "Set a hyper-parameter of the defense, such as iterations=50; may be repeated.", "KEY=VALUE"
    )
    seed: int = option("Seed of all random choices.", 0)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast import api
        from holdfast.defenses import DEFENSES
        from holdfast.defenses.registry import build_defense
        from holdfast.experiments.recipe import read_overrides
        from holdfast.models import load_task_for
        from holdfast.report.terminal import show
        from holdfast.results import read_result
        from holdfast.runtime.distributed import speaks

        values = read_overrides(self.set)
        if "name" in values:
            raise HoldfastError(f"--set name={values['name']}: choose the defense with --defense.")
        kind = DEFENSES.get(self.defense)
        self.refuse_options(values, () if kind is None else [f.name for f in dataclasses.fields(kind)])  # type: ignore[arg-type]
        defense = build_defense({"name": self.defense, **values})
        benign, restricted = (
            load_task_for(task, self.model, data_dir=self.data_dir) for task in (self.benign, self.restricted)
        )
        original = self.loaded(self.model, benign, self.data_dir)
        with self.callbacks(self.out) as callbacks:
            api.immunize(
                original, benign=benign, restricted=restricted, defense=defense, seed=self.seed, device=self.device,
                threads=self.threads, folder=self.out, quiet=False, callbacks=callbacks,
            )  # fmt: skip
        result = read_result(self.out)
        record = result.immunization
        assert record is not None
        if speaks():
            show(result, self.out)
            print(f"{'Model' if record.nothing else 'Immunized model'}: {self.out / 'model.safetensors'}")
        return NOT_IMMUNIZED if record.nothing else 0


@dataclass(kw_only=True)
class Audit(TrackOption, ComputeOptions, ModelOptions, Command):
    """Audit a model against its original and against training from scratch; a gate for CI.

    Exits with 0 if the model resists, 3 if it does not (partial, fails), 4 if the audit is invalid, 2 on bad input.
    """

    model: str = argument(f"The model to audit: {SOURCES}")
    original: str = option("The model before it was immunized, given like MODEL.")
    benign: str = option(f"Its own task: {TASKS}")
    restricted: str = option("The task that it must not be fine-tuned to; named like `benign`.")
    out: Path = option("Folder for result.json, report.html and finished trials.")
    transfer: str | None = option(
        "A harmless task that it should still learn as well as the original; named like `benign`.", None
    )
    reference: str | None = option(
        "Another public model, given like MODEL, that is fine-tuned in place of one from scratch; the verdict then "
        "holds against it. For models that are too large to train one from scratch.",
        None,
    )
    original_weights: Path | None = option("As --weights, for ORIGINAL.", None)
    original_head: str | None = option("As --head, for ORIGINAL.", None)
    original_mean: str | None = option("As --mean, for ORIGINAL.", None)
    original_std: str | None = option("As --std, for ORIGINAL.", None)
    battery: str = option(
        "Adversaries: quick-v1, quick-v2, standard-v1, standard-v2, probes-v1, generation-v1, text-to-image-quick-v1, "
        "text-to-image-v1, language-v1, causal-quick-v1, causal-v1, causal-v2, or a search: adaptive-v1, adaptive-v2, "
        "adaptive-causal-v1.",
        "quick-v1",
    )
    budgets: str = option("Fine-tuning steps after which to score; the first is 0.", "0,5,10,20,50,100")
    seeds: int = option("Repetitions of every attack.", 5)
    decide: bool = option(
        "Add repetitions in stages until the band decides, or --max-seeds ends; also to an audit in OUT that could "
        "not decide.",
        False,
    )
    max_seeds: int | None = option("Most repetitions with --decide (default: four times --seeds).", None)
    shots: int | None = option("Adversary's training samples a class (default: its whole half).", None)
    trials: int | None = option("Trials of a search on each model (default: 48); not for other batteries.", None)
    reported: float | None = option(
        "Restricted score after the last budget that the publisher claims, such as 0.23; for comparison.", None
    )
    reported_benign: float | None = option(
        "Benign score of ORIGINAL that its publisher claims, such as 0.92; if the measured score is far lower, the "
        "audit is invalid, and says so first.",
        None,
    )
    measure: Sequence[str] = repeated(
        "Measure what language models can still do, before and after the best attack: a task of lm-evaluation-harness, "
        "or one of your own as lm-eval:FILE.yaml; may be repeated.",
        "lm-eval:TASK",
    )
    set: Sequence[str] = repeated(
        "Set a threshold of the verdict, such as max_advantage=0.03, or side_effects, stacked, precision or "
        "micro_batch; may be repeated.",
        "KEY=VALUE",
    )
    seed: int = option("Seed of all random choices.", 0)
    executor: str = option(f"Where trials run: {EXECUTORS}", "serial")

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast import api
        from holdfast.experiments.recipe import read_overrides
        from holdfast.models import load_released, load_task_for
        from holdfast.report.terminal import show
        from holdfast.results import read_result
        from holdfast.runtime.argument_checks import split_numbers

        limits, more = self._settings(read_overrides(self.set))
        if self.trials is not None:
            more["trials"] = self.trials
        if self.decide or self.max_seeds is not None:
            more |= {"decide": self.decide, "max_seeds": self.max_seeds}
        if self.measure:
            more["measures"] = tuple(self.measure)
        tasks = {
            name: load_task_for(named, self.original, data_dir=self.data_dir)
            for name in ("benign", "restricted", "transfer")
            if (named := getattr(self, name)) is not None
        }
        model = self.loaded(self.model, tasks["benign"], self.data_dir)
        original = self.loaded(self.original, tasks["benign"], self.data_dir, prefix="original_")
        reference = (
            None
            if self.reference is None
            else load_released(self.reference, None, tasks["restricted"], own_head=False, data_dir=self.data_dir)
        )
        with self.callbacks(self.out) as callbacks:
            api.audit(
                model, original=original, reference=reference, benign=tasks["benign"], restricted=tasks["restricted"],
                transfer=tasks.get("transfer"), seed=self.seed, device=self.device, threads=self.threads,
                folder=self.out, quiet=False, battery=self.battery, seeds=self.seeds,
                budgets=split_numbers(self.budgets, "--budgets", int), shots=self.shots, reported=self.reported,
                reported_benign=self.reported_benign, thresholds=limits, executor=self.executor, source=self._source(),
                callbacks=callbacks, **more,
            )  # fmt: skip
        result = read_result(self.out)
        show(result, self.out)
        return exit_code(result.audit.verdict.label if result.audit else None)

    def _source(self) -> dict[str, str | None]:
        """Names of models and tasks, for `holdfast replay`."""
        each = ("weights", "head", "mean", "std")
        models, tasks = ("model", "original", "reference"), ("benign", "restricted", "transfer")
        names = (*models, *tasks, *each, *(f"original_{name}" for name in each))
        return {name: None if (value := getattr(self, name)) is None else str(value) for name in names}

    @classmethod
    def _settings(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits the values of `--set` into thresholds, and settings of the audit that have no option."""
        from holdfast.auditing.spec import AuditSpec
        from holdfast.results import Thresholds

        options = [field.name for field in dataclasses.fields(cls)]
        settable = [k for k in AuditSpec.model_fields if k not in (*options, "thresholds", "measures")]
        bare = {key.removeprefix("thresholds."): value for key, value in values.items()}
        if len(bare) < len(values):
            raise HoldfastError("--set names a threshold twice, with and without `thresholds.`; keep one.")
        cls.refuse_options(bare, [*Thresholds.model_fields, *settable])
        for key in bare:
            if key not in Thresholds.model_fields and key not in settable:
                raise unknown("setting for --set:", key, [*Thresholds.model_fields, *settable])
        limits = {key: value for key, value in bare.items() if key in Thresholds.model_fields}
        return limits, {key: value for key, value in bare.items() if key in settable}


@dataclass(kw_only=True)
class Attack(ComputeOptions, ModelOptions, Command):
    """Fine-tune a model as adversaries do, and keep what they made: weights, a LoRA, or learned word vectors.

    Without controls and a verdict, which `holdfast audit` has; adversaries get the same half of the restricted training
    data. A killed command continues when it is run again, with the same numbers.
    """

    model: str = argument(f"The model to attack: {SOURCES}")
    restricted: str = option(f"The task that it is fine-tuned to: {TASKS}")
    benign: str | None = option(
        "Its own task, which sizes the model, which some adversaries use, and which is scored afterwards (default: the "
        "restricted one sizes the model).",
        None,
    )
    out: Path = option("Folder for result.json, report.html and attacked/, with one folder for each adversary.")
    adversary: str | None = option(
        "Kind of a single adversary: finetuning, dreambooth, textual-inversion, probe, unlabelled, ...; its settings "
        "are set with --set.",
        None,
    )
    battery: str | None = option("Name of a battery, all of whose adversaries run (default: quick-v1).", None)
    set: Sequence[str] = repeated(
        "Set a setting of the adversary, such as scope=lora-attention, learning_rate=1e-3; may be repeated.",
        "KEY=VALUE",
    )
    budgets: str = option("Fine-tuning steps after which to score; the first is 0.", "0,5,10,20,50,100")
    shots: int | None = option("Adversary's training samples a class (default: its whole half).", None)
    seed: int = option("Seed of all random choices.", 0)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast import api
        from holdfast.models import load_task_for
        from holdfast.report.terminal import show
        from holdfast.results import read_result
        from holdfast.runtime.argument_checks import split_numbers

        battery = self._battery()
        restricted = load_task_for(self.restricted, self.model, data_dir=self.data_dir)
        benign = None if self.benign is None else load_task_for(self.benign, self.model, data_dir=self.data_dir)
        model = self.loaded(self.model, restricted if benign is None else benign, self.data_dir)
        api.attack(
            model, restricted=restricted, benign=benign, battery=battery, shots=self.shots, seed=self.seed,
            budgets=split_numbers(self.budgets, "--budgets", int), device=self.device, threads=self.threads,
            folder=self.out, quiet=False,
        )  # fmt: skip
        show(read_result(self.out), self.out)
        return 0

    def _battery(self) -> Any:
        """The name of a battery, or a list of the adversary that `--adversary` and `--set` describe."""
        from holdfast.adversaries import build
        from holdfast.experiments.recipe import read_overrides

        values = read_overrides(self.set)
        if self.adversary is None:
            if values:
                raise HoldfastError(f"--set {next(iter(values))}: settings are those of an --adversary; name its kind.")
            return self.battery or "quick-v1"
        if self.battery is not None:
            raise HoldfastError("--adversary and --battery are both given; keep one.")
        self.refuse_options(values, ())
        return [build({"kind": self.adversary, **values})]


@dataclass(kw_only=True)
class Feasibility(ComputeOptions, ModelOptions, Command):
    """Tell from spectra alone whether a linear extractor can immunize a model, by how much, and at what benign cost.

    Nothing is trained. Uses the defender's half of the restricted training data.
    """

    model: str | None = argument(
        "Named as for `holdfast audit`; a pretrained model may have other classes than the benign task (default: no "
        "model, the features are the inputs).",
        None,
    )
    benign: str = option(
        "The task that should stay easy to learn: digits[0-4], cifar10, x.npz, t.csv@target=price,kind=regression, ..."
    )
    restricted: str = option("The task that should become hard to learn; named like `benign`.")
    out: Path = option("Folder for result.json and report.html.")
    ridge: float = option("Ridge per sample, for the bound on features that one of the tasks does not use.", 0.01)
    q: float = option("Share of the removable loss that is gone after the predicted number of steps.", 0.9)

    def __call__(self) -> int:
        """See `Command`."""
        from holdfast import api
        from holdfast.models import load_task_for
        from holdfast.report.terminal import show
        from holdfast.results import read_result

        benign, restricted = (
            load_task_for(task, self.model, data_dir=self.data_dir) for task in (self.benign, self.restricted)
        )
        alone = [name for name in ("weights", "head", "mean", "std") if getattr(self, name) is not None]
        if self.model is None and alone:
            raise HoldfastError(f"--{alone[0]} needs a MODEL, and none is given; name one, such as cifar_resnet.")
        model = None if self.model is None else self.loaded(self.model, benign, self.data_dir, own_head=False)
        api.feasibility(
            benign, restricted, model=model, ridge=self.ridge, q=self.q, device=self.device, threads=self.threads,
            folder=self.out, quiet=False,
        )  # fmt: skip
        show(read_result(self.out), self.out)
        return 0


@dataclass(kw_only=True)
class Recipes(Command):
    """List the recipes that come with Holdfast, or print one."""

    name: str | None = argument("Print this recipe's YAML, as a start for your own.", None)

    def __call__(self) -> int:
        """See `Command`."""
        from rich.console import Console
        from rich.table import Table

        from holdfast.runtime.documents import read_yaml, recipe_names, recipe_text

        if self.name is not None:
            from holdfast.experiments.recipe import load  # imports torch, which the list of recipes does not need

            load(self.name)
            print(recipe_text(self.name), end="")
            return 0
        table = Table("recipe", "scales", "about")
        for each in recipe_names():
            content = read_yaml(recipe_text(each), f"Recipe {each!r}")
            scales = ", ".join(sorted({"cpu", *content.get("scales", {})}))
            table.add_row(each, scales, content.get("about", content["title"]))
        Console().print(table)
        return 0


def exit_code(label: str | None) -> int:
    """Returns the exit code of a verdict."""
    return {"resists": RESISTS, "partial": DOES_NOT_RESIST, "fails": DOES_NOT_RESIST}.get(label or "", INVALID)
