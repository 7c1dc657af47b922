"""Recipes: YAML files that name models, tasks, defenses and attacks; their schema and their loader."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holdfast.auditing.spec import AuditSpec
from holdfast.defenses import DEFENSES, Defense, LinearDefense
from holdfast.defenses.registry import build_defense
from holdfast.errors import HoldfastError, unknown
from holdfast.experiments.linear.specs import StudySpec
from holdfast.experiments.protocol import ProtocolSpec
from holdfast.models import ModelSpec, SplitModel, check_fits, is_code, load_model
from holdfast.runtime.argument_checks import readable, refuse_truth_as_number
from holdfast.runtime.devices import MAX_THREADS
from holdfast.runtime.documents import read_yaml, recipe_names, recipe_text
from holdfast.runtime.run import Run
from holdfast.tasks import Task, TaskSpec
from holdfast.training import PretrainSpec

Scale = Literal["smoke", "cpu", "paper"]
JobName = Literal["run", "study", "protocol"]


class _Common(BaseModel):
    """Keys of every recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    about: str = Field("", description="What it shows and how long it takes; shown by `holdfast recipes`.")
    seed: int = Field(0, ge=0)
    threads: int | None = Field(
        None,
        ge=1,
        le=MAX_THREADS,
        description="CPU threads of torch; null: its default. Sums depend on it in the last digit.",
    )
    scales: dict[Scale, dict[str, Any]] = Field({}, description="Overrides by scale, each `dotted.key: value`.")


class Recipe(_Common):
    """A run: one model, one defense, one audit."""

    job: ClassVar[JobName] = "run"
    kind: Literal["run"] = "run"
    model: ModelSpec
    pretrain: PretrainSpec | None = None
    benign: TaskSpec
    restricted: TaskSpec
    transfer: TaskSpec | None = Field(None, description="A harmless task that the model should still learn.")
    reference: ModelSpec | None = Field(
        None, description="Another public model, which the audit fine-tunes in place of one from scratch."
    )
    defense: dict[str, Any] = Field(description="`name`, and its hyper-parameters.")
    audit: AuditSpec = AuditSpec()

    def load_reference(
        self, restricted: Task, *, data_dir: Path | str | None, device: torch.device
    ) -> SplitModel | None:
        """Loads the reference, if there is one.

        Raises:
            HoldfastError: if it has no weights.
        """
        spec = self.reference
        if spec is None:
            return None
        if spec.weights is None and not spec.options.get("pretrained") and not spec.name.startswith("hf:"):
            raise HoldfastError(
                f"The reference {spec.name!r} has no weights, and without them it is training from scratch; give "
                "`reference.weights`, or name a model that has its own, such as hf:FOLDER."
            )
        with Run(self.seed, device).seeded("reference"):
            reference = load_model(spec, restricted, data_dir=data_dir, device=device)
        check_fits(reference, restricted, own_task=False)
        return reference

    def build_defense(self) -> Defense:
        """Returns the defense with its hyper-parameters."""
        return build_defense(self.defense)

    def resolved(self) -> dict[str, Any]:
        """Returns every setting, defaults included, as it goes into `result.json`."""
        settings = self.model_dump(mode="json", exclude={"scales"})
        defense = self.build_defense()
        settings["defense"] = {"name": defense.name, **defense.config()}
        return settings


class StudyRecipe(StudySpec, _Common):
    """A study: several linear defenses, measured alike."""

    job: ClassVar[JobName] = "study"
    kind: Literal["study"]

    def build_methods(self) -> dict[str, LinearDefense]:
        """Returns the defenses by the name of their row."""
        methods = {}
        for row, settings in self.methods.items():
            defense = build_defense(settings)
            if not isinstance(defense, LinearDefense):
                linear = [name for name, defense in DEFENSES.items() if issubclass(defense, LinearDefense)]
                raise HoldfastError(
                    f"Method {row!r}: a study compares linear extractors, and {defense.name} is not one; expected one "
                    f"of {', '.join(linear)}."
                )
            methods[row] = defense
        return methods

    def resolved(self) -> dict[str, Any]:
        """Returns every setting, defaults included, as it goes into `result.json`."""
        settings = self.model_dump(mode="json", exclude={"scales", "methods"})
        settings["methods"] = {row: {"name": d.name, **d.config()} for row, d in self.build_methods().items()}
        return settings


class ProtocolRecipe(ProtocolSpec, _Common):
    """A protocol: fixed attacks on several models side by side."""

    job: ClassVar[JobName] = "protocol"
    kind: Literal["protocol"]

    def build_defenses(self) -> dict[str, Defense]:
        """Returns the defenses by the name of their row."""
        return {row: build_defense(settings) for row, settings in self.defenses.items()}

    def resolved(self) -> dict[str, Any]:
        """Returns every setting, defaults included, as it goes into `result.json`."""
        settings = self.model_dump(mode="json", exclude={"scales", "defenses"})
        settings["defenses"] = {row: {"name": d.name, **d.config()} for row, d in self.build_defenses().items()}
        return settings


AnyRecipe = Recipe | StudyRecipe | ProtocolRecipe


def load(name: str, *, scale: Scale = "cpu", overrides: Sequence[str] = (), seed: int | None = None) -> AnyRecipe:
    """Reads a recipe, and applies first its scale, then the overrides.

    Args:
        name: name of a packaged recipe, or path of a YAML file.
        scale: `smoke` (seconds, to see that it works), `cpu` (two cores) or `paper` (the full setting, for a GPU).
        overrides: `dotted.key=value`, the value in YAML.
        seed: replaces the recipe's seed.

    Raises:
        HoldfastError: for an unknown name, key (with a suggestion) or scale, or a value that does not fit.

    Example:
        >>> load("quickstart", overrides=["defense.steps=7"]).build_defense().config()["steps"]
        7
    """
    source = repr(name)
    settings = read_yaml(_text(name), f"Recipe {source}")
    if not isinstance(settings, dict):
        raise HoldfastError(
            f"Recipe {source} is empty or not a mapping; expected keys such as title, model, benign, restricted."
        )
    scales = settings.get("scales") or {}
    if not isinstance(scales, dict) or not all(
        isinstance(s, str) and isinstance(v or {}, dict) and all(isinstance(k, str) for k in v or {})
        for s, v in scales.items()
    ):
        raise HoldfastError(
            f"Recipe {source}: scales is {str(scales)[:80]!r}; expected a mapping of scales, each a mapping of "
            "`dotted.key: value`."
        )
    if scale != "cpu" and scale not in scales:
        raise HoldfastError(f"Recipe {source} has no scale {scale!r}; it has: {', '.join(sorted({'cpu', *scales}))}.")
    _assign_all(settings, scales.get(scale) or {}, source, f"Recipe {source}, scale {scale!r}:")
    chosen = read_overrides(overrides)
    if any(key.split(".")[0] == "scales" for key in chosen):
        raise HoldfastError("--set of scales has no effect: the scale is applied before it. Set the key itself.")
    if seed is not None and "seed" in chosen:
        raise HoldfastError(f"--seed {seed} and --set seed={chosen['seed']} are both given; keep one.")
    _assign_all(settings, chosen, source, "--set")
    if seed is not None:
        settings["seed"] = seed
    schemas: dict[str, type[AnyRecipe]] = {"run": Recipe, "study": StudyRecipe, "protocol": ProtocolRecipe}
    kind = str(settings.get("kind", "run"))
    if kind not in schemas:
        raise HoldfastError(f"Recipe {source}: {unknown('kind', kind, schemas)}")
    recipe = _validate(settings, source, schemas[kind])
    recipe.resolved()  # builds the defenses, which check their settings
    parts = recipe.settings.values() if isinstance(recipe, ProtocolRecipe) else [recipe]
    for pretrain in [getattr(part, "pretrain", None) for part in parts]:
        if pretrain is not None:
            pretrain.strategy()
    return recipe


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parses the values of `--set`: `key=value`, the value in YAML.

    Raises:
        HoldfastError: if there is no `=`, a value is not valid, or a key is given twice.

    Example:
        >>> read_overrides(["audit.seeds=3", "defense.clip=null"])
        {'audit.seeds': 3, 'defense.clip': None}
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if not equals:
            raise HoldfastError(f"--set {override!r} has no '='; write it as key=value.")
        if key in values:
            raise HoldfastError(f"--set {key} is given twice; keep one.")
        values[key] = read_yaml(value, f"--set {override!r}: the value")
    return values


def _assign_all(settings: dict[str, Any], values: Mapping[str, Any], source: str, what: str) -> None:
    """Assigns in order; refuses a key that would replace an earlier key inside it."""
    for i, key in enumerate(values):
        lost = next((other for other in list(values)[:i] if other.startswith(f"{key}.")), None)
        if lost is not None:
            raise HoldfastError(f"{what} {key!r} comes after {lost!r} and would replace it; put {key!r} first.")
        _assign(settings, key, values[key], source)


def _assign(settings: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Sets `a.b.c` in nested mappings, adding missing ones; the schema refuses unknown keys afterwards."""
    *parents, leaf = dotted.split(".")
    mapping = settings
    for key in parents:
        inner = mapping.get(key) or {}
        if not isinstance(inner, dict):
            raise HoldfastError(f"Recipe {source}: {dotted!r} goes through {key!r}, which is not a mapping.")
        mapping[key] = {**inner}  # copied, since an alias in YAML may put one mapping in several places
        mapping = mapping[key]
    mapping[leaf] = copy.deepcopy(value)


def _validate(settings: Mapping[str, Any], source: str, schema: type[AnyRecipe]) -> AnyRecipe:
    try:
        recipe = schema.model_validate(settings)
    except ValidationError as error:
        raise readable(error, f"Recipe {source}", schema) from error
    refuse_truth_as_number(settings, recipe, f"Recipe {source}")
    models = [s.model for s in recipe.settings.values()] if isinstance(recipe, ProtocolRecipe) else [recipe.model]
    for model in models:
        if model is not None and is_code(model.name):
            raise HoldfastError(
                f"Recipe {source}: the model {model.name!r} is made by code, and recipes never run code. If you trust "
                "it, give it to `holdfast immunize` and `holdfast audit` instead."
            )
    return recipe


def _text(name: str) -> str:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise HoldfastError(f"No recipe at {name!r}: the file does not exist.")
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise HoldfastError(f"Recipe {name!r} is not UTF-8 text ({error}).") from error
    if name not in recipe_names():
        raise HoldfastError(f"{unknown('recipe', name, recipe_names())} The path of a file must end in .yaml.")
    return recipe_text(name)
