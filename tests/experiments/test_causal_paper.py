"""The recipe `causal/paper`: everything of its paper scale but the sizes, on tiny models of Llama's architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.errors import HoldfastError
from holdfast.experiments.recipe import load
from holdfast.experiments.replay import replay
from holdfast.experiments.runner import run_recipe
from holdfast.models import load_model, load_task_for
from holdfast.runtime.run import Run
from holdfast.tasks.splits import halves
from texts import WORDS, save_causal, write_rows

DOCS = Path(__file__).parents[2] / "docs" / "causal.md"
OTHERS = re.findall(r"^--set '(defense=\{.*\})'$", DOCS.read_text(), re.MULTILINE)
BRIEF = [
    "benign.length=12", "restricted.length=12", "benign.test_limit=6", "restricted.test_limit=6",
    "audit.battery=causal-quick-v1", "audit.budgets=[0,1]", "audit.seeds=1", "audit.shots=8",
]  # fmt: skip
ONE_ROUND = {
    "iterations": 1, "steps": 2, "evaluate_every": 1, "initialisations": ["direct"], "learning_rates": [1e-3],
    "batch_sizes": [4], "reinforcement_batch": 4, "reinforcement_loops": 1, "probe_batch": 8, "batch_size": 4,
    "max_benign_drop": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    save_causal(folder / "llama", num_hidden_layers=2)
    save_causal(folder / "reference", num_hidden_layers=1)
    for part, verb in (("benign", "was"), ("restricted", "is")):
        rows = [{"prompt": f"{a} {b} {verb}", "answer": f"{b} {a}"} for a in WORDS[:6] for b in WORDS[6:12]]
        write_rows(folder / f"{part}.jsonl", rows)
    return folder


def brief(*overrides):
    """The paper scale with the recipe's defense or another, for one round."""
    chosen = load("causal/paper", scale="paper", overrides=list(overrides))
    own = {key: value for key, value in ONE_ROUND.items() if key in chosen.build_defense().config()}
    return chosen.model_copy(update={"defense": {**chosen.defense, **own}})


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run_recipe(brief(*BRIEF), folder=folder, data_dir=data, device="cpu")


def test_it_is_immunized_and_audited_against_the_reference(found):
    _, result = found
    assert {"original", "immunized", "reference"} == result.provenance.models.keys()
    assert result.provenance.models["reference"].parameters < result.provenance.models["original"].parameters
    assert {curve.role for curve in result.audit.curves} == {"immunized", "original", "scratch"}
    assert result.immunization.completed
    reference = {c.adversary: c.scores[0] for c in result.audit.curves if c.role == "scratch"}
    assert len(set(reference.values())) < len(reference)  # direct starts: the reference itself, not fresh weights


def test_adversaries_train_in_bfloat16_on_parts_of_a_batch(found):
    configs = [c for c in found[1].audit.adversaries.values() if c["kind"] == "finetuning"]
    assert len(configs) == 7
    assert {(c["precision"], c["micro_batch"]) for c in configs} == {("bf16", 4)}
    assert all("bf16 in parts of 4" in c.adversary or "prompt" in c.adversary for c in found[1].audit.curves)


@pytest.mark.parametrize("role", ["immunized", "scratch"])
def test_a_trial_is_repeated_to_the_digit(found, data, role):
    assert replay(found[0], role=role, data_dir=data).same


def test_activations_are_computed_again(data):
    chosen = brief(*BRIEF)
    for spec in (chosen.model, chosen.reference):
        task = load_task_for(chosen.benign, spec, data_dir=data)
        layers = load_model(spec, task, data_dir=data).network.modules()
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in layers)


def test_the_documents_name_the_other_defenses():
    assert [load("causal/paper", scale="paper", overrides=[line]).build_defense().name for line in OTHERS] == [
        "sophon", "tar", "repnoise",
    ]  # fmt: skip


@pytest.mark.parametrize("line", OTHERS, ids=["sophon", "tar", "repnoise"])
def test_the_other_defenses_take_a_step(data, line):
    chosen = brief(*BRIEF, line)
    tasks = [load_task_for(spec, chosen.model, data_dir=data) for spec in (chosen.benign, chosen.restricted)]
    model = load_model(chosen.model, tasks[0], data_dir=data)
    immunized, record = chosen.build_defense().immunize(model, tasks[0], halves(tasks[1])[0], run=Run(0))
    assert record.completed
    assert immunized.facts().sha256 != model.facts().sha256


def test_a_reference_without_weights_is_refused(data, tmp_path):
    chosen = brief(*BRIEF, "reference={name: llama}")
    with pytest.raises(HoldfastError, match=r"reference 'llama' has no weights.*hf:FOLDER"):
        run_recipe(chosen, folder=tmp_path / "new", data_dir=data)
    assert not (tmp_path / "new").exists()
