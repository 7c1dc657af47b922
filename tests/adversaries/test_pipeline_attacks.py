"""Adversaries of captions on every class of diffusers pipeline; their pipelines read what the adversaries made."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import pipelines
from cases import CAPTIONED
from holdfast.adversaries import FineTuning, TextualInversion
from holdfast.adversaries.saving import save_attacked
from holdfast.models import load_released, load_task_for
from holdfast.training import Strategy
from holdfast.training.rare_tokens import Concepts, rare_tokens
from pipelines import PIPELINES

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.trains

TASK = "digits[0-2]@kind=text-to-image,caption=No {},length=12,image_size=16,channels=3,train_limit=12,test_limit=4"
KINDS = pytest.mark.parametrize("kind", PIPELINES)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Returns a pipeline's folder, its model and its task."""
    root, known = tmp_path_factory.mktemp("pipelines"), {}

    def load(kind):
        if kind not in known:
            folder = pipelines.saved(root / kind, kind)
            task = load_task_for(TASK, f"diffusers:{folder}", data_dir=root)
            known[kind] = folder, load_released(str(folder), None, task), task
        return known[kind]

    return load


def attacked(adversary, model, task, run, folder):
    kept = []
    adversary.attack(model, task, budgets=[0, 2], run=run, keep=kept.append)
    return kept[0], save_attacked(model, kept[0], task, folder)


@KINDS
def test_each_runs_or_says_why_not(loaded, run, kind):
    _, model, task = loaded(kind)
    before, refused = model.facts().sha256, {}
    for name, adversary in CAPTIONED.items():
        reason = adversary.not_applicable(model, task)
        if reason is not None:
            refused[name] = reason
            continue
        curve = adversary.attack(model, task, budgets=[0, 1], run=run, benign=task)
        assert all(score is not None and math.isfinite(score) for score in curve.scores), name
    assert model.facts().sha256 == before
    joint = {n for n in CAPTIONED if "cross-attention" in CAPTIONED[n].name} if kind in ("flux", "sd3") else set()
    assert set(refused) == joint, refused
    assert all("no cross-attention" in refused[name] for name in joint)


@KINDS
def test_every_text_encoder_reads_a_rare_token(loaded, kind):
    _, model, task = loaded(kind)
    concepts, ids = Concepts.of(task), rare_tokens(model, task, None)
    assert torch.equal(torch.cat([part.captions for part in concepts.parts], 1), concepts.captions)
    assert len(ids) == len(concepts.parts) == {"sdxl": 2, "flux": 2, "sd3": 3}.get(kind, 1)
    for part, row, tokens in zip(concepts.with_tokens(ids).chunk(len(ids), 1), concepts.parts, ids, strict=True):
        for prompt, caption, at, token in zip(part, row.captions, row.at, tokens, strict=True):
            assert prompt[at] == token
            assert prompt.tolist() == [*caption[:at].tolist(), token, *caption[at:-1].tolist()]


@KINDS
def test_diffusers_reads_the_lora(loaded, run, tmp_path, kind):
    folder, model, task = loaded(kind)
    adapters = FineTuning(Strategy("direct", "lora-attention", "adamw", 3e-2, 6))
    made, files = attacked(adapters, model, task, run, tmp_path)
    if kind == "pixart":  # to which diffusers cannot give a LoRA
        assert files == ["model.safetensors"]
        return
    assert files == ["pytorch_lora_weights.safetensors"]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    pipeline.load_lora_weights(tmp_path)
    theirs = model.clone()
    theirs.network = network.eval()
    batch = next(iter(task.sweep("test", 4, device=model.device)))
    with torch.no_grad():
        found, ours, before = (each.eval()(batch.x) for each in (theirs, made, model.clone()))
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["stable-diffusion", "sdxl"])
def test_diffusers_reads_the_learned_vectors(loaded, run, tmp_path, kind):
    folder, model, task = loaded(kind)
    made, files = attacked(TextualInversion(0.1, 6), model, task, run, tmp_path)
    assert files == [*(f"learned_embeds-{i}.safetensors" for i in range(3)), "prompts.json"]
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    for file in files[:3]:
        (token,) = load_file(tmp_path / file)
        more = {"text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer} if kind == "sdxl" else {}
        pipeline.load_textual_inversion(str(tmp_path), weight_name=file, token=token, **more)
    for label, caption in enumerate(task.captions):
        prompt = prompts[caption]["prompt"]
        ids = pipeline.tokenizer(prompt, padding="max_length", max_length=12, return_tensors="pt").input_ids
        learned = ids >= 75
        assert int(learned.sum()) == 1
        with torch.no_grad():
            table = pipeline.text_encoder.get_input_embeddings()(ids)
            part = made._prompted(task.tokens[[label]]).chunk(1 if kind == "stable-diffusion" else 2, 1)[0]
            ours = made.text.embedding(part)
        torch.testing.assert_close(table, ours)
