"""Adversaries of text-to-image models, against the training examples of diffusers; and the files that they leave."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import reference
from cases import CAPTIONED
from holdfast.adversaries import UNDO, DreamBooth, FineTuning, TextualInversion, battery, build
from holdfast.adversaries.saving import save_attacked
from holdfast.errors import HoldfastError
from holdfast.metrics.generation import sample_captions
from holdfast.models import ModelSpec, load_model
from holdfast.tasks import Batch, Tokenizer, Vocabulary, load_task
from holdfast.tasks.text_to_image import TextToImageTask
from holdfast.training import Strategy, prepare, pretrain
from holdfast.training.rare_tokens import Concepts, rare_tokens
from texts import save_tokenizer

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
KIND = "@kind=text-to-image,caption=a photo of the digit {}"
SPEC = ModelSpec(name="text-unet", options={"widths": [8]})
PLAIN = Strategy("direct", "all", "sgd", 1.0, 6)


@pytest.fixture(scope="module")
def tasks():
    return load_task(f"digits[0-1]{KIND}").limit_test(10, 0), load_task(f"digits[8-9]{KIND}").limit_test(10, 0)


@pytest.fixture(scope="module")
def model(tasks):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_model(SPEC, tasks[0]).eval()


@pytest.fixture(scope="module")
def learned(model, tasks):
    return pretrain(model, tasks[0], steps=15, strategy=Strategy("direct", "all", "adam", 3e-3, 20))


def drawn(task, count, seed):
    """Images, time steps, noise and captions of a batch, and the batch itself."""
    generator = torch.Generator().manual_seed(seed)
    images = task.images("train")[:count]
    t = torch.randint(1000, (count,), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    labels = torch.arange(count) % len(task.captions)
    return (images, t, noise, labels), Batch(task.inputs(task.schedule.noised(images, t, noise), labels), noise)


def gradients(loss, network):
    return torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad], allow_unused=True)


def fixed(monkeypatch, batches):
    """Tasks yield these batches, by the task's name."""
    monkeypatch.setattr(TextToImageTask, "batches", lambda self, *_a, **_k: iter(batches[self.name]))


class TestScopes:
    def test_cross_attention_alone_is_trained(self, model, tasks, run):
        kept = {}
        strategy = Strategy("direct", "cross-attention", "adam", 1e-2, 6)
        FineTuning(strategy).attack(
            model, tasks[1], budgets=[0, 2], run=run, keep=lambda m: kept.update(m.network.state_dict())
        )
        moved = {n for n, v in model.network.state_dict().items() if not torch.equal(v, kept[n])}
        parts = ("to_q", "to_k", "to_v", "to_out.0")
        assert moved
        assert all(".attn2." in name and any(f".{p}." in name for p in parts) for name in moved)
        assert {p for p in parts if any(f".{p}." in name for name in moved)} == set(parts)

    @pytest.mark.parametrize("name", ["digits[8-9]@kind=denoising", "digits[8-9]"])
    def test_other_models_have_none(self, name):
        task = load_task(name)
        other = load_model("unet" if "@" in name else "cnn", task)
        reason = FineTuning(Strategy("direct", "cross-attention")).not_applicable(other, task)
        assert reason == "it has no cross-attention, which reads a caption"

    @pytest.mark.parametrize(("scope", "beyond"), [("lora-attention", False), ("lora", True)])
    def test_adapters_are_where_diffusers_examples_have_them(self, model, tasks, scope, beyond):
        victim = model.clone()
        prepare(victim, Strategy("direct", scope, "adamw"), tasks[1])
        trained = [n for n, p in victim.network.named_parameters() if p.requires_grad]
        assert all(".lora_" in name for name in trained)
        layers = {n.split(".lora_")[0] for n in trained}
        attention = {
            n for n, _ in victim.network.named_modules() if n.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
        }
        assert attention <= layers
        assert (layers != attention) == beyond
        assert victim.head_name not in layers

    def test_a_new_head_is_trained_beside_them(self, model, tasks):
        victim = model.clone()
        prepare(victim, Strategy("head", "cross-attention"), tasks[1])
        assert victim.head.weight.requires_grad


class TestTheSameLossAsDiffusers:
    def test_full_fine_tuning(self, model, tasks):
        task = tasks[1]
        (images, t, noise, labels), batch = drawn(task, 6, 1)
        states = model.text(task.caption_ids(labels)).states
        wanted = reference.noise_error(model.network, model.schedule.alpha_bar, images, t, noise, states)
        assert task.loss(model, batch).item() == pytest.approx(wanted.item(), rel=1e-5)

    @pytest.mark.parametrize("weight", [1.0, 0.3])
    def test_dreambooth_with_a_prior(self, model, tasks, run, monkeypatch, weight):
        """A step of plain descent at rate 1 changes the weights by the gradient."""
        benign, task = tasks
        adversary = DreamBooth(PLAIN, prior="benign", prior_weight=weight)
        (ours, first), (theirs, second) = drawn(task, 6, 1), drawn(benign, 6, 2)
        fixed(monkeypatch, {task.name: [first] * 2, benign.name: [second] * 2})
        after = {}
        curve = adversary.attack(
            model, task, budgets=[0, 1], run=run, benign=benign, keep=lambda m: after.update(m.network.state_dict())
        )
        prompts = Concepts.of(task).with_tokens(rare_tokens(model, task, benign))
        states = model.text(prompts[ours[3]]).states, model.text(benign.caption_ids(theirs[3])).states
        network = copy.deepcopy(model.network)
        loss = reference.dreambooth_loss(
            network, model.schedule.alpha_bar, (*ours[:3], states[0]), (*theirs[:3], states[1]), weight
        )
        alone = reference.noise_error(network, model.schedule.alpha_bar, *ours[:3], states[0])
        assert curve.losses[1] == pytest.approx(alone.item(), rel=1e-5)
        for (name, before), gradient in zip(network.named_parameters(), gradients(loss, network), strict=True):
            torch.testing.assert_close(before.detach() - gradient, after[name], rtol=1e-4, atol=1e-5, msg=name)

    def test_textual_inversion(self, model, tasks, monkeypatch, run):
        task = tasks[1]
        batches = [drawn(task, 6, seed) for seed in (1, 2, 3)]
        fixed(monkeypatch, {task.name: [b for _, b in batches]})
        kept = []
        curve = TextualInversion(0.05).attack(model, task, budgets=[0, 1, 2, 3], run=run, keep=kept.append)
        (new,), concepts = rare_tokens(model, task, None), Concepts.of(task)
        text = copy.deepcopy(model.text)
        with torch.no_grad():
            for row, word in zip(new, concepts.parts[0].words, strict=True):
                text.embedding.weight[row] = text.embedding.weight[list(word)].mean(0)
        table = text.embedding.weight.requires_grad_(True)
        prompts = concepts.in_place(new)
        plain = [(*b[:3], prompts[b[3]]) for b, _ in batches]
        losses = reference.textual_inversion(
            model.network, lambda ids: text.encode_row(ids).states, table, new, plain, model.schedule.alpha_bar, 0.05
        )
        assert curve.losses[1:] == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(kept[0].text.embedding.weight, table, rtol=1e-4, atol=1e-5)

    def test_textual_inversion_changes_nothing_but_the_new_rows(self, model, tasks, run):
        before, kept = model.facts().sha256, []
        TextualInversion(0.05).attack(model, tasks[1], budgets=[0, 2], run=run, keep=kept.append)
        rows = (kept[0].text.embedding.weight != model.text.embedding.weight).any(1).nonzero().flatten().tolist()
        assert rows == sorted(rare_tokens(model, tasks[1], None)[0])
        assert model.facts().sha256 == before
        for name, value in model.network.state_dict().items():
            assert torch.equal(value, kept[0].network.state_dict()[name]), name
        others = {n: v for n, v in model.text.state_dict().items() if n != "words.weight"}
        assert all(torch.equal(v, kept[0].text.state_dict()[n]) for n, v in others.items())

    def test_lora(self, model, tasks):
        task = tasks[1]
        (images, t, noise, labels), batch = drawn(task, 6, 1)
        victim = model.clone()
        prepare(victim, Strategy("direct", "lora", "adamw", rank=4), task)
        generator = torch.Generator().manual_seed(0)
        adapters = {}
        for name, layer in victim.network.named_modules():
            if hasattr(layer, "lora_B"):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                with torch.no_grad():
                    b.copy_(0.1 * torch.randn(b.shape, generator=generator))
                adapters[name] = (a.detach(), b.detach())
        merged = reference.with_adapters(model.network, adapters, 16 / 4)
        states = model.text(task.caption_ids(labels)).states
        wanted = reference.noise_error(merged, model.schedule.alpha_bar, images, t, noise, states)
        assert task.loss(victim, batch).item() == pytest.approx(wanted.item(), rel=1e-4)
        assert task.loss(model, batch).item() != pytest.approx(wanted.item(), rel=1e-2)


class TestPrompts:
    def test_each_caption_has_a_token_of_its_own(self, model, tasks):
        benign, task = tasks
        (ids,) = rare_tokens(model, task, benign)
        assert len(set(ids)) == len(task.captions)
        assert not {*ids} & {*task.tokens.flatten().tolist(), *benign.tokens.flatten().tolist(), 0}
        assert ids[0] == int(task.tokenizer.encode(["sks"], 1)[0, 0])
        assert [ids] == rare_tokens(model, task, benign)

    def test_a_tokenizer_with_marks_around_sentences(self, model, tmp_path):
        """As CLIP's: a first and a last token, and the last one pads."""
        from tokenizers.processors import TemplateProcessing
        from transformers import AutoTokenizer

        save_tokenizer(tmp_path, pad=None, words=["a", "photo", "of", "cat", "dog", "sks", "[START]", "rare"])
        fast = AutoTokenizer.from_pretrained(tmp_path)
        start, end = fast.convert_tokens_to_ids(["[START]", "[END]"])
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single="[START] $A [END]", special_tokens=[("[START]", start), ("[END]", end)]
        )
        fast.add_special_tokens({"bos_token": "[START]", "pad_token": "[END]"})
        tokenizer = Tokenizer(Vocabulary("marked", len(fast), end, "none"), fast)
        images = torch.randint(256, (8, 8, 8), dtype=torch.uint8).numpy()
        labels = [0, 1] * 4
        task = TextToImageTask(
            "pets", images, labels, images, labels, ["cat", "dog cat"], template="a photo of {}", tokenizer=tokenizer,
            length=8,
        )  # fmt: skip
        concepts, (ids,) = Concepts.of(task), rare_tokens(model, task, None)
        assert fast.convert_ids_to_tokens(ids) == ["sks", "rare"]
        assert concepts.parts[0].words == tuple((fast.convert_tokens_to_ids(w),) for w in ("cat", "cat"))
        shown = [fast.convert_ids_to_tokens(row) for row in concepts.with_tokens([ids]).tolist()]
        assert shown[0] == ["[START]", "a", "photo", "of", "sks", "cat", "[END]", "[END]"]
        assert shown[1] == ["[START]", "a", "photo", "of", "dog", "rare", "cat", "[END]"]
        shown = [fast.convert_ids_to_tokens(row) for row in concepts.in_place(ids).tolist()]
        assert shown[0] == ["[START]", "a", "photo", "of", "sks", "[END]", "[END]", "[END]"]
        full = TextToImageTask("pets", images, labels, images, labels, ["cat", "dog cat"], template="a photo of {}",
                               tokenizer=tokenizer, length=7)  # fmt: skip
        with pytest.raises(HoldfastError, match="no room for another"):
            Concepts.of(full)

    def test_a_caption_that_fills_all_tokens_leaves_no_room(self, model):
        task = load_task("digits[8-9]@kind=text-to-image,caption=a photo of the digit {},length=6")
        for adversary in (DreamBooth(PLAIN), TextualInversion()):
            assert "no room for another one" in adversary.not_applicable(model, task)

    def test_other_kinds_have_no_captions(self):
        task = load_task("digits[8-9]@kind=denoising")
        for adversary in (DreamBooth(PLAIN), TextualInversion()):
            reason = adversary.not_applicable(load_model("unet", task), task)
            assert reason == f"it changes captions, which {task.described} does not have"
            with pytest.raises(HoldfastError, match="changes captions"):
                next(adversary.run(load_model("unet", task), task, benign=None, generator=None, device=CPU))

    def test_scores_are_those_of_the_prompts(self, model, tasks, run):
        """At step 0 the rare token is all that differs."""
        task, kept = tasks[1], []
        curve = DreamBooth(PLAIN, prior_weight=0.0).attack(model, task, budgets=[0, 1], run=run)
        prompted = model.clone()
        concepts = Concepts.of(task)
        prompted.prompt_with(concepts.captions, concepts.with_tokens(rare_tokens(model, task, None)))
        assert curve.scores[0] == task.audit_score(prompted) != task.audit_score(model)
        assert not kept


class TestPrior:
    def test_it_is_what_the_released_model_draws(self, model, tasks, run, monkeypatch):
        given = {}
        plain = TextToImageTask.with_training_images
        monkeypatch.setattr(
            TextToImageTask, "with_training_images",
            lambda self, images, labels: (given.update(images=images, labels=labels), plain(self, images, labels))[1],
        )  # fmt: skip
        adversary = DreamBooth(PLAIN, prior_images=5, prior_steps=3, guidance=2.0)
        adversary.attack(model, tasks[1], budgets=[0, 1], run=run)
        assert given["labels"].tolist() == [0, 1, 0, 1, 0]
        seed = int(torch.randint(2**31, (), generator=run.generator("attack", adversary.name, 0)))
        tokens = tasks[1].tokens
        again = sample_captions(model, tokens[given["labels"]], tokens[-1:], seed=seed, steps=3, guidance=2.0)
        assert torch.equal(given["images"], again)

    def test_benign_images_need_a_benign_task_with_captions(self, model, tasks, run):
        for benign, word in ((None, "none is given"), (load_task("digits[0-1]@kind=denoising"), "has no captions")):
            with pytest.raises(HoldfastError, match=word):
                DreamBooth(PLAIN, prior="benign").attack(model, tasks[1], budgets=[0, 1], run=run, benign=benign)

    @pytest.mark.parametrize(
        ("setting", "word"),
        [({"prior": "other"}, "did you mean"), ({"prior_weight": -1}, "prior_weight is -1"),
         ({"prior_images": 0}, "prior_images is 0"), ({"guidance": float("nan")}, "guidance is nan"),
         ({"undo": ("nothing",)}, "nothing")],
    )  # fmt: skip
    def test_bad_settings(self, setting, word):
        with pytest.raises(HoldfastError, match=word if word != "did you mean" else "'other'"):
            DreamBooth(PLAIN, **setting)

    @pytest.mark.parametrize("setting", [{"learning_rate": 0}, {"batch_size": 0}, {"weight_decay": -1}])
    def test_bad_settings_of_textual_inversion(self, setting):
        with pytest.raises(HoldfastError, match=next(iter(setting))):
            TextualInversion(**setting)


def test_a_prior_is_drawn_with_classifier_free_guidance(model, tasks):
    """One step from the last time step: x_0 of the guided noise."""
    task = tasks[1]
    found = sample_captions(model, task.tokens[:1], task.tokens[-1:], seed=3, steps=1, guidance=2.5)
    x = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        t = torch.tensor([999])
        told, plain = (
            model.network(x, t, model.text(ids[None]).states).sample for ids in (task.tokens[0], task.tokens[-1])
        )
    a = model.schedule.alpha_bar[999]
    wanted = (x - (1 - a) ** 0.5 * (plain + 2.5 * (told - plain))) / a**0.5
    torch.testing.assert_close(found, wanted.clamp(-1, 1), rtol=1e-3, atol=1e-3)


class TestFiles:
    def attacked(self, adversary, model, task, run, folder, benign=None):
        kept = []
        adversary.attack(model, task, budgets=[0, 2], run=run, benign=benign, keep=kept.append)
        return kept[0], save_attacked(model, kept[0], task, folder)

    @pytest.mark.parametrize("scope", ["lora-attention", "lora"])
    def test_diffusers_reads_the_lora(self, model, tasks, run, tmp_path, scope):
        adversary = FineTuning(Strategy("direct", scope, "adamw", 1e-2, 6, rank=4))
        attacked, files = self.attacked(adversary, model, tasks[1], run, tmp_path)
        assert files == ["pytorch_lora_weights.safetensors"]
        pipeline = diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=copy.deepcopy(model.network),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.load_lora_weights(tmp_path)
        x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
        states = model.text(tasks[1].tokens[:2]).states
        with torch.no_grad():
            theirs, ours, before = (n(x, t, states).sample for n in (pipeline.unet, attacked.network, model.network))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert (ours - before).abs().max() > 1e-4

    @pytest.mark.parametrize(
        "adversary",
        [FineTuning(Strategy("head", "lora", "adamw", 1e-2, 6)), FineTuning(Strategy("direct", "all", "adam", 1e-3, 6)),
         FineTuning(Strategy("direct", "lora", "adamw", 1e-2, 6), undo=("rescale", "shrink-perturb"))],
        ids=lambda a: a.name,
    )  # fmt: skip
    def test_weights_that_a_lora_does_not_hold_are_all_written(self, adversary, model, tasks, run, tmp_path):
        attacked, files = self.attacked(adversary, model, tasks[1], run, tmp_path)
        assert files == ["model.safetensors"]
        again = model.clone()
        again.load(tmp_path / "model.safetensors")
        assert tasks[1].audit_score(again) == pytest.approx(tasks[1].audit_score(attacked), abs=1e-5)

    def test_diffusers_reads_the_learned_vectors(self, tasks, run, tmp_path):
        from transformers import CLIPTextConfig, CLIPTextModel

        (tmp_path / "encoder").mkdir()
        words = ["a", "photo", "of", "the", "digit", *map(str, range(10)), "sks", "rare"]
        save_tokenizer(tmp_path / "encoder", words=words)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPTextConfig(vocab_size=len(words) + 3, max_position_embeddings=20, eos_token_id=1, **sizes)
        CLIPTextModel(config).save_pretrained(tmp_path / "encoder")
        kind = f"{KIND},tokenizer={tmp_path / 'encoder'}"
        task = load_task(f"digits[8-9]{kind}").limit_test(10, 0)
        spec = ModelSpec(name="text-unet", options={"widths": [8], "text_encoder": str(tmp_path / "encoder")})
        released = load_model(spec, task)
        attacked, files = self.attacked(TextualInversion(0.1, 6), released, task, run, tmp_path / "made")
        assert files == ["learned_embeds-0.safetensors", "learned_embeds-1.safetensors", "prompts.json"]
        prompts = json.loads((tmp_path / "made" / "prompts.json").read_text())
        pipeline = diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=copy.deepcopy(released.text.module), tokenizer=task.tokenizer.fast,
            unet=released.network, scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        for file in files[:2]:
            (token,) = load_file(tmp_path / "made" / file)
            pipeline.load_textual_inversion(str(tmp_path / "made"), weight_name=file, token=token)
        for label, caption in enumerate(task.captions):
            prompt = prompts[caption]["prompt"]
            ids = pipeline.tokenizer(prompt, padding="max_length", max_length=16, return_tensors="pt").input_ids
            with torch.no_grad():
                theirs = pipeline.text_encoder(ids).last_hidden_state
                ours = attacked.text(attacked._prompted(task.tokens[[label]])).states
            seen = int((ids != 0).sum())  # padding is masked in ours
            torch.testing.assert_close(theirs[:, :seen], ours[:, :seen], rtol=1e-4, atol=1e-5)

    def test_dreambooth_says_what_to_prompt_with(self, model, tasks, run, tmp_path):
        adversary = DreamBooth(Strategy("direct", "lora-attention", "adamw", 1e-2, 6), prior_weight=0.0)
        _, files = self.attacked(adversary, model, tasks[1], run, tmp_path)
        assert files == ["pytorch_lora_weights.safetensors", "prompts.json"]
        prompts = json.loads((tmp_path / "prompts.json").read_text())
        token = rare_tokens(model, tasks[1], None)[0][1]
        assert prompts["a photo of the digit 9"]["ids"][:7] == [*tasks[1].tokens[1, :5].tolist(), token, 980]


@pytest.mark.parametrize("name", CAPTIONED)
class TestEveryAdversaryOfCaptions:
    def test_learns_on_a_copy_and_repeats(self, name, learned, tasks, run):
        benign, restricted = tasks[0], tasks[1].few_shot(20, 0)
        adversary, digest = CAPTIONED[name], learned.facts().sha256
        enough = 20 if name.startswith("textual-inversion") else 6  # vectors alone learn slowly
        settings = {"budgets": [0, 1, enough], "run": run, "benign": benign, "score_benign": True}
        curve = adversary.attack(learned, restricted, **settings)
        assert learned.facts().sha256 == digest
        assert curve.finite
        assert curve.benign_after is not None
        assert curve.scores[-1] > curve.scores[0]
        again = adversary.attack(learned, restricted, **{**settings, "budgets": [0, 1], "score_benign": False})
        assert again.scores == curve.scores[:2]

    def test_can_be_built_from_its_config(self, name, learned, tasks, run):
        assert build(CAPTIONED[name].config()) == CAPTIONED[name]


class TestBattery:
    def test_all_of_it_runs(self, tasks, run):
        benign, restricted = (task.few_shot(4, 0).limit_test(4, 0) for task in tasks)
        model = load_model(ModelSpec(name="text-unet", options={"widths": [8]}), benign)
        for adversary in battery("text-to-image-v1"):
            assert adversary.not_applicable(model, restricted) is None, adversary.name
            drawn = isinstance(adversary, DreamBooth)  # its usual prior takes 20 images in 20 steps
            brief = replace(adversary, prior_images=2, prior_steps=1) if drawn else adversary
            curve = brief.attack(model, restricted, budgets=[0, 1], run=run, benign=benign)
            assert curve.scores[0] is not None, adversary.name

    def test_it_covers_what_it_says(self):
        members, quick = battery("text-to-image-v1"), battery("text-to-image-quick-v1")
        assert members[: len(quick)] == quick
        tuned = [a for a in members if isinstance(a, FineTuning)]
        assert {a.strategy.initialisation for a in tuned} == {"direct", "head", "last-block", "last-half"}
        assert {a.strategy.scope for a in tuned} == {"all", "cross-attention", "lora", "lora-attention"}
        assert Strategy("direct", "all", "momentum", 1e-4, 50, 1e-4) in [
            a.strategy for a in tuned
        ]  # the paper's attack
        dreams = [a for a in members if isinstance(a, DreamBooth)]
        assert {a.strategy.scope for a in dreams} == {"all", "cross-attention", "lora-attention"}
        assert {a.prior for a in dreams} == {"drawn", "benign"}
        assert sum(isinstance(a, TextualInversion) for a in members) == 2

    @pytest.mark.parametrize("move", UNDO)
    def test_every_undo_move_is_made_or_says_why_not(self, move, tasks, run):
        restricted = tasks[1].few_shot(4, 0).limit_test(4, 0)
        small = load_model(ModelSpec(name="text-unet", options={"widths": [8]}), restricted)
        adversary = FineTuning(Strategy("direct", "all", "adam", 1e-3, 6), undo=(move,))
        reason = adversary.not_applicable(small, restricted)
        if reason is None:
            assert adversary.attack(small, restricted, budgets=[0, 1], run=run).finite
        else:
            assert any(
                word in reason for word in ("images are shown", "BatchNorm", "head takes an image", "hidden layer")
            )
