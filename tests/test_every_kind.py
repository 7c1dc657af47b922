"""Every kind of task, with each family of models that reads it, and every adversary: attack, undo, audit, report.

An adversary either runs and gives scores, or says in words why it does not fit. Nothing in between is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import pipelines
from cases import ADVERSARIES, CAPTIONED
from holdfast import audit
from holdfast.adversaries import UNDO, Adversary, FewShotPrompt, FineTuning, Probe
from holdfast.models import ModelSpec, SplitModel, load_model, load_task_for
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import Strategy
from texts import save_causal, save_models, write_text

pytestmark = pytest.mark.trains

TRAINED = ("direct-all-", "head-all-", "head-head-")
"""Beginnings of the names of the rows that differ by their optimizer alone."""


def mechanisms() -> dict[str, Adversary]:
    """The table of adversaries with one optimizer for each start and scope, and two probes of all."""
    kept = {n: a for n, a in ADVERSARIES.items() if not n.startswith((*TRAINED, "probe-"))}
    started = {n: a for n, a in ADVERSARIES.items() if n.startswith(TRAINED) and n.endswith("-adam")}
    more = {f"undo-{m}": FineTuning(Strategy("head", "all", "adam", 2e-3, 20), undo=(m,)) for m in UNDO}
    scopes = {
        f"scope-{scope}": FineTuning(Strategy("direct", scope, "adam", 1e-2, 20, rank=2))
        for scope in ("lora-attention", "qlora", "embeddings", "norm", "cross-attention")
    }
    probes = {"probe-ridge": Probe("ridge"), "probe-adam": Probe("adam", "standardised", 0.1)}
    captioned = {
        f"captions-{name}": CAPTIONED[name] for name in ("dreambooth", "dreambooth-benign", "textual-inversion")
    }
    return {**started, **kept, **more, **scopes, **probes, **captioned, "prompt": FewShotPrompt(2)}


@dataclass(frozen=True)
class Case:
    """A kind of task with a family of models.

    Attributes:
        model: the model's spec, or a function that makes one in a folder.
        benign: the model's own task; `FOLDER` stands for the folder.
        restricted: likewise.
        fits: names of adversaries that must run on it.
    """

    model: ModelSpec | Callable[[Path], str]
    benign: str
    restricted: str
    fits: tuple[str, ...] = ("direct-all-adam",)


def bert(folder: Path) -> str:
    save_models(folder)
    (folder / "others.csv").write_text((folder / "reviews.csv").read_text().replace(" was ", " is "))
    return f"hf:{folder / 'bert-classifier'}"


def llama(folder: Path) -> str:
    for i in range(2):
        write_text(folder / f"{i}.txt", seed=i)
    return save_causal(folder / "llama")


def flux(folder: Path) -> str:
    """A transformer on latents that are packed, with two text encoders and flow matching."""
    return f"diffusers:{pipelines.saved(folder / 'pipeline', 'flux')}"


def numbers(folder: Path) -> ModelSpec:
    rows = "\n".join(
        f"{i % 7},{i % 5},{(i * 3) % 11},{i % 7 + 0.5 * (i % 5)},{i % 5 - 0.1 * (i % 7)}" for i in range(80)
    )
    (folder / "table.csv").write_text(f"a,b,c,first,second\n{rows}\n")
    return ModelSpec(name="mlp", options={"width": 8})


SMALL = "train_limit=60,test_limit=15"
LATENTS = f"kind=text-to-image,caption=no {{}},length=12,image_size=16,channels=3,{SMALL}"
WORDS = "FOLDER/reviews.csv@text=review,target=label,length=8"
TABLE = "FOLDER/table.csv@kind=regression,target=first,drop=second"
CASES = {
    "images, cnn": Case(
        ModelSpec(name="cnn", options={"width": 4}), f"digits[0-4]@{SMALL}", f"digits[5-9]@{SMALL}",
        ("head-all-adam", "undo-whiten", "probe-ridge", "ablation"),
    ),
    "images, timm": Case(
        ModelSpec(name="timm:test_resnet"), f"digits[0-1]@image_size=32,channels=3,{SMALL}",
        f"digits[2-3]@image_size=32,channels=3,{SMALL}", ("head-all-adam", "undo-recalibrate"),
    ),
    "numbers, mlp": Case(numbers, TABLE, TABLE.replace("first,drop=second", "second,drop=first"), ("probe-ridge",)),
    "sentences, BERT": Case(bert, WORDS, WORDS.replace("reviews", "others"), ("head-all-adam", "scope-lora-attention")),
    "next token, Llama": Case(
        llama, "FOLDER/0.txt@length=8", "FOLDER/1.txt@length=8", ("direct-all-adam", "scope-lora-attention", "prompt")
    ),
    "denoising, U-Net": Case(
        ModelSpec(name="unet", options={"widths": [8], "attention": 1}), f"digits[0-4]@kind=denoising,{SMALL}",
        f"digits[5-9]@kind=denoising,{SMALL}", ("head-all-adam", "scope-lora-attention"),
    ),
    "text-to-image, U-Net": Case(
        ModelSpec(name="text-unet", options={"widths": [8], "attention": 1}),
        f"digits[0-4]@kind=text-to-image,caption=a photo of the digit {{}},{SMALL}",
        f"digits[5-9]@kind=text-to-image,caption=a photo of the digit {{}},{SMALL}",
        ("head-all-adam", "scope-lora-attention", "captions-dreambooth", "captions-textual-inversion"),
    ),
    "text-to-image, Flux": Case(
        flux, f"digits[0-4]@{LATENTS}", f"digits[5-9]@{LATENTS}", ("head-all-adam", "scope-lora-attention")
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def built(request, tmp_path_factory) -> tuple[Case, SplitModel, Task, Task]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("kind")
    spec = case.model if isinstance(case.model, ModelSpec) else case.model(folder)
    benign, restricted = (
        load_task_for(t.replace("FOLDER", str(folder)), spec, data_dir=folder) for t in (case.benign, case.restricted)
    )
    with Run(seed=0).seeded("initialise"):
        return case, load_model(spec, benign), benign, restricted


def test_every_adversary_runs_or_says_why_not(built, run):
    case, model, benign, restricted = built
    few = restricted.few_shot(4, 0) if restricted.labels_are_classes else restricted.few_shot(16, 0)
    before, ran = model.facts().sha256, []
    for name, adversary in mechanisms().items():
        reason = adversary.not_applicable(model, few)
        if reason is not None:
            assert len(reason.split()) > 3, (name, reason)
            continue
        curve = adversary.attack(model, few, budgets=(0, 1), run=run, seed=0, benign=benign)
        assert len(curve.scores) == 2, name
        assert all(s is not None and math.isfinite(s) and s <= 1 for s in curve.scores), (name, curve.scores)
        ran.append(name)
    assert set(case.fits) <= set(ran)
    assert model.facts().sha256 == before


@pytest.mark.usefixtures("brief_look")
def test_it_is_audited_and_reported(built, run, tmp_path):
    case, model, benign, restricted = built
    chosen = [mechanisms()[name] for name in case.fits]
    shots = 2 if restricted.labels_are_classes else 8
    result = audit(
        model, original=model, benign=benign, restricted=restricted, battery=chosen, seeds=1, shots=shots,
        budgets=(0, 2), folder=tmp_path,
    )  # fmt: skip
    assert {c.adversary for c in result.curves if c.role == "immunized"} == {a.name for a in chosen}
    assert result.verdict.label in ("fails", "partial", "invalid")  # it is the original itself
    page = (tmp_path / "report.html").read_text()
    assert result.verdict.label in page
    assert all(a.name in page for a in chosen)
