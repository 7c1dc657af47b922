"""Text-to-image pipelines of diffusers, of the classes that are released, with small random weights."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
from holdfast.errors import HoldfastError
from holdfast.metrics.generation import sample_captions
from holdfast.models import ModelSpec, SplitModel, TextToImage, load_model, load_released, load_task_for
from holdfast.models.families.conditional import packed
from holdfast.training import Strategy, finetune
from pipelines import PIPELINES, SIDE

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
TASK = "digits[0-2]@kind=text-to-image,caption=No {},length=12,image_size=16,channels=3,train_limit=12,test_limit=8"
PROMPT = "No 1"
KINDS = pytest.mark.parametrize("kind", PIPELINES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each pipeline, which tests must not change."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: pipelines.saved(root / kind, kind) for kind in PIPELINES}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(folders, cache):
    """Returns a pipeline's model, which a test may change, and its task."""
    known = {}

    def load(kind):
        if kind not in known:
            task = load_task_for(TASK, f"diffusers:{folders[kind]}", data_dir=cache)
            known[kind] = load_released(str(folders[kind]), None, task), task
        model, task = known[kind]
        return model.clone(), task

    return load


@pytest.fixture
def changed(folders, tmp_path):
    """A copy of the folder of Stable Diffusion, which a test may change."""
    return shutil.copytree(folders["stable-diffusion"], tmp_path / "changed")


def draw(pipeline, kind, **more):
    """One image, as the pipeline draws it without guidance by a second, empty caption."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"pixart": {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 12},
                "flux": {"max_sequence_length": 12}, "sd3": {"max_sequence_length": 12}}  # fmt: skip
    if kind != "flux":
        settings.setdefault(kind, {})["guidance_scale"] = 1.0
    return pipeline(
        PROMPT, height=SIDE, width=SIDE, generator=torch.Generator().manual_seed(0),
        **{"num_inference_steps": 2, "output_type": "np", **settings.get(kind, {}), **more},
    ).images  # fmt: skip


def called(pipeline, kind):
    """What the pipeline calls its network with first: x_t, the time, and the answer."""
    seen = []
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    hook = network.register_forward_hook(
        lambda _, args, named, output: seen.append((args, named, output)), with_kwargs=True
    )
    draw(pipeline, kind)
    hook.remove()
    args, named, output = seen[0]
    noised = args[0] if args else named["hidden_states"]
    time = args[1] if len(args) > 1 else named["timestep"]
    return noised, float(time.flatten()[0]), output[0]


class TestCalls:
    @KINDS
    def test_the_network_answers_as_in_diffusers_own_pipeline(self, folders, loaded, kind):
        model, task = loaded(kind)
        noised, time, expected = called(diffusers.DiffusionPipeline.from_pretrained(folders[kind]), kind)
        t = 999 if model.schedule.flows else round(time)
        assert model.schedule.network_time(torch.tensor([t])).item() == pytest.approx(
            time * (1000 if kind == "flux" else 1)
        )
        if kind == "flux":  # the pipeline keeps them packed
            generator = torch.Generator().manual_seed(0)
            latents = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=generator)
            assert torch.equal(packed(latents), noised)
            noised = latents
        x = task.inputs(model.schedule.with_steps(noised, torch.tensor([t])), torch.tensor([1]))
        with torch.no_grad():
            found = model.predict(noised, torch.tensor([t]), model.text(task.caption_ids(torch.tensor([1]))))
            noise = model(x)
            other = model.predict(noised, torch.tensor([t]), model.text(task.caption_ids(torch.tensor([2]))))
        expected = expected[:, :4] if kind == "pixart" else expected
        assert torch.allclose(packed(found) if kind == "flux" else found, expected, atol=1e-5)
        assert torch.equal(noise, model.noise_of(found, noised, torch.tensor([t])))
        assert not torch.allclose(found, other, atol=1e-6)  # the caption matters

    def test_sizes_in_pixels_reach_the_network(self, loaded):
        for kind, name in (("sdxl", "time_ids"), ("pixart", "resolution")):
            model, task = loaded(kind)
            seen = []
            model.network.register_forward_pre_hook(
                lambda _, args, named, seen=seen: seen.append(named["added_cond_kwargs"]), with_kwargs=True
            )
            model(next(task.sweep("test", 2, device=CPU)).x)
            assert seen[0][name].tolist() == [[16, 16, 0, 0, 16, 16] if kind == "sdxl" else [16, 16]] * 2

    def test_flux_without_guidance_and_pixart_without_sizes(self, tmp_path, cache):
        for kind, made in (("flux", pipelines.flux(guidance=False)), ("pixart", pipelines.pixart(sizes=False))):
            made.save_pretrained(tmp_path / kind)
            task = load_task_for(TASK, f"diffusers:{tmp_path / kind}", data_dir=cache)
            model = load_released(str(tmp_path / kind), None, task)
            assert model(next(task.sweep("test", 2, device=CPU)).x).shape == (2, 4, 8, 8)

    @pytest.mark.trains
    @KINDS
    def test_training_changes_the_network_and_not_the_text_encoder(self, loaded, kind):
        model, task = loaded(kind)
        before, text = model.facts().sha256, model._text_sha256()
        assert {id(p) for p in model.text.parameters()}.isdisjoint({id(p) for p in model.parameters()})
        steps = finetune(
            model,
            task,
            Strategy("direct", "all", "adamw", 1e-3, 4),
            generator=torch.Generator().manual_seed(0),
            device=CPU,
        )
        next(steps)
        assert model.facts().sha256 != before
        assert model._text_sha256() == text


class TestParts:
    @KINDS
    def test_blocks_are_in_the_order_in_which_they_run(self, loaded, kind):
        model, task = loaded(kind)
        names = [block[0][0] for block in model.blocks()]
        ran = []
        for name in names:
            model.network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        model(next(task.sweep("test", 2, device=CPU)).x)
        assert ran == names
        assert len(names) > 3

    @KINDS
    def test_a_fresh_head_and_a_fresh_network(self, loaded, kind):
        model, _ = loaded(kind)
        before = {k: v.clone() for k, v in model.network.state_dict().items()}
        with torch.random.fork_rng():
            model.reset_head()
            fresh = model.fresh()
        after = model.network.state_dict()
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert moved == {f"{model.head_name}.weight", f"{model.head_name}.bias"}
        assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
        assert isinstance(fresh, TextToImage)
        assert [n for n, _ in fresh.network.named_modules()] == [n for n, _ in model.network.named_modules()]
        assert fresh.num_outputs == model.num_outputs == 4
        with pytest.raises(HoldfastError, match="images of 4 channels, and 3 are needed"):
            model.reset_head(3)

    @pytest.mark.parametrize(("kind", "layer"), [
        ("stable-diffusion", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("pixart", "transformer_blocks.0.attn2.to_k"),
        ("flux", "transformer_blocks.0.attn.add_k_proj"),
        ("sd3", "transformer_blocks.0.attn.add_k_proj"),
    ])  # fmt: skip
    def test_the_layers_that_read_the_text(self, loaded, kind, layer):
        model, _ = loaded(kind)
        layers = model.cross_attention()
        assert layer in layers
        assert all(module is model.network.get_submodule(name) for name, module in layers.items())

    def test_a_probe_does_not_read_patches(self, loaded):
        assert "makes patches" in loaded("pixart")[0].not_probed(1)
        assert "predicts flow" in loaded("flux")[0].not_probed(1)
        assert loaded("stable-diffusion")[0].not_probed(1) is None


class TestFiles:
    @KINDS
    def test_a_saved_folder_gives_the_same_image_in_plain_diffusers(self, folders, loaded, tmp_path, kind):
        model, _ = loaded(kind)
        model.save_pretrained(tmp_path / "same")
        with torch.no_grad():
            model.head.weight.add_(0.5)
        model.save_pretrained(tmp_path / "other")
        folders = folders[kind], tmp_path / "same", tmp_path / "other"
        pipes = [diffusers.DiffusionPipeline.from_pretrained(folder) for folder in folders]
        before, same, other = (draw(pipe, kind) for pipe in pipes)
        assert np.array_equal(before, same)
        assert not np.allclose(before, other, atol=1e-4)
        assert np.array_equal(draw(model.pipeline(), kind), other)
        assert type(pipes[1]) is type(pipes[0])

    def test_holdfast_reads_the_folder_that_it_wrote(self, loaded, tmp_path):
        model, task = loaded("stable-diffusion")
        again = SplitModel.from_pretrained(model.save_pretrained(tmp_path / "again"), task)
        assert again.facts().sha256 == model.facts().sha256
        assert task.score(again) == task.score(model)

    def test_the_folder_itself_is_not_overwritten(self, folders, loaded):
        with pytest.raises(HoldfastError, match="is the folder that diffusers:sdxl was loaded from"):
            loaded("sdxl")[0].save_pretrained(folders["sdxl"])

    @pytest.mark.parametrize("kind", ["sdxl", "flux"])
    def test_it_is_sent_to_other_processes(self, loaded, kind):
        model, task = loaded(kind)
        again = pickle.loads(pickle.dumps(model))
        assert again.facts().sha256 == model.facts().sha256
        assert task.score(again) == task.score(model)
        with torch.random.fork_rng():
            assert again.fresh().num_outputs == 4

    def test_ddim_samples_from_diffusion_and_not_from_flow_matching(self, loaded):
        assert draw(loaded("stable-diffusion")[0].pipeline(ddim=True), "stable-diffusion").shape == (1, SIDE, SIDE, 3)
        with pytest.raises(HoldfastError, match="flow matching, which DDIM does not"):
            loaded("flux")[0].pipeline(ddim=True)

    @KINDS
    def test_our_own_file_finds_the_text_encoders_again(self, loaded, tmp_path, kind):
        model, task = loaded(kind)
        with torch.no_grad():
            model.head.weight.add_(0.5)
        model.save(tmp_path / "model.safetensors")
        again = load_released(str(tmp_path / "model.safetensors"), None, task)
        assert again.facts().sha256 == model.facts().sha256
        assert task.score(again) == task.score(model)

    def test_a_folder_that_was_moved(self, changed, cache, tmp_path):
        task = load_task_for(TASK, f"diffusers:{changed}", data_dir=cache)
        model = load_released(str(changed), None, task)
        model.save(tmp_path / "model.safetensors")
        moved = changed.rename(tmp_path / "moved")
        with pytest.raises(HoldfastError, match=r"changed' is gone.*diffusers:FOLDER"):
            load_released(str(tmp_path / "model.safetensors"), None, task)
        with pytest.raises(HoldfastError, match=r"changed' is gone"):
            model.save_pretrained(tmp_path / "out")
        spec = ModelSpec(name=f"diffusers:{moved}", weights=str(tmp_path / "model.safetensors"))
        assert load_model(spec, task).facts().sha256 == model.facts().sha256

    def test_a_file_that_names_another_folder_is_refused(self, folders, loaded, tmp_path):
        model, task = loaded("stable-diffusion")
        model.spec["options"]["pipeline"] = str(folders["flux"])
        model.save(tmp_path / "model.safetensors")
        with pytest.raises(HoldfastError, match="No FluxTransformer2DModel can be built"):
            load_released(str(tmp_path / "model.safetensors"), None, task)


class TestSampling:
    @pytest.mark.parametrize("kind", ["stable-diffusion", "flux"])
    def test_pictures_of_captions_in_the_tasks_own_size(self, loaded, kind):
        model, task = loaded(kind)
        latents = sample_captions(
            model, task.tokens[:2], task.tokens[-1:], seed=0, steps=2, guidance=2.0, shape=task.output_shape
        )
        assert latents.shape == (2, 4, 8, 8)
        assert task.pixels(latents).shape == (2, 3, SIDE, SIDE)
        assert not torch.equal(latents[0], latents[1])

    def test_a_network_without_a_size(self, loaded):
        model, task = loaded("flux")
        with pytest.raises(HoldfastError, match="does not specify the size of its pictures; give their shape"):
            sample_captions(model, task.tokens[:2], seed=0, steps=2)

    def test_euler_steps_of_flow_matching_end_where_diffusers_own_do(self, folders, loaded):
        """The pipeline of Flux in 5 steps, against `step_back` at the same sigmas."""
        model, task = loaded("flux")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folders["flux"])
        expected = draw(pipeline, "flux", output_type="latent", num_inference_steps=5)
        sigmas = pipeline.scheduler.sigmas[:5]
        times = [int((model.schedule.sigma - sigma).abs().argmin()) for sigma in sigmas]
        x = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))
        text = model.text(task.caption_ids(torch.tensor([1])))
        with torch.no_grad():
            for i, now in enumerate(times):
                t = torch.tensor([now])
                flow = model.predict(x, t, text)
                later = torch.zeros(1) if i == 4 else model.schedule.sigma[times[i + 1]]
                stepped = x + (later - model.schedule.sigma[now]) * flow
                if 0 < i < 4:  # no estimate of x_0 is possible from noise alone
                    back, _ = model.schedule.step_back(x, model.noise_of(flow, x, t), t, torch.tensor([times[i + 1]]))
                    assert torch.allclose(back, stepped, atol=1e-4)
                x = stepped
        assert torch.allclose(packed(x), expected, atol=1e-4)


class TestRefused:
    def test_a_task_of_pixels(self, folders, loaded):
        with pytest.raises(HoldfastError, match=r"reads latents of 4 channels.*images have 3.*autoencoder="):
            load_released(str(folders["sdxl"]), None, loaded_pixels())

    def test_captions_of_another_tokenizer(self, folders, loaded):
        _, task = loaded("flux")
        with pytest.raises(HoldfastError, match=r"reads ids of the tokenizer 'sd3'"):
            load_released(str(folders["sd3"]), None, task)

    def test_another_schedule(self, changed, loaded):
        _, task = loaded("stable-diffusion")
        diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(changed / "scheduler")
        with pytest.raises(HoldfastError, match=r"schedule flow matching, 1000 steps, shift 1.*has scaled_linear"):
            load_released(str(changed), None, task)

    @pytest.mark.parametrize("part", ["unet", "text_encoder"])
    def test_pickled_and_missing_weights(self, changed, loaded, part):
        _, task = loaded("stable-diffusion")
        file = next((changed / part).glob("*.safetensors"))
        weights = load_file(file)
        weights.pop(sorted(weights)[0])
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(HoldfastError, match="has no weights for"):
            load_released(str(changed), None, task)
        torch.save(weights, file.with_suffix(".bin"))
        file.unlink()
        with pytest.raises(HoldfastError, match="in safetensors"):
            load_released(str(changed), None, task)

    @pytest.mark.parametrize(("change", "message"), [
        ({"text_encoder": ["my_code", "Encoder"]}, "text_encoder is a Encoder; expected one of CLIPTextModel"),
        ({"text_encoder": [None, None]}, "has 0 text encoders and 1 tokenizers; expected 1 of both"),
        ({"unet": ["diffusers", "UNet2DModel"]}, r"whose unet is .*UNet2DModel.*expected .*UNet2DConditionModel"),
        ({"_class_name": "StableVideoDiffusionPipeline"}, "or a text-to-image pipeline of StableDiffusionPipeline"),
    ])  # fmt: skip
    def test_an_index_of_other_parts(self, changed, loaded, change, message):
        _, task = loaded("stable-diffusion")
        index = changed / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
        with pytest.raises(HoldfastError, match=message):
            load_released(str(changed), None, task)

    def test_networks_that_are_called_in_another_way(self, loaded):
        text = loaded("stable-diffusion")[0].text
        with pytest.raises(HoldfastError, match="takes 9 channels and returns 4, as one for inpainting does"):
            TextToImage(pipelines.unet(in_channels=9), text)
        with pytest.raises(HoldfastError, match="needs the class of each image"):
            TextToImage(pipelines.unet(class_embed_type="timestep"), text)
        with pytest.raises(HoldfastError, match="addition_embed_type is text"):
            TextToImage(pipelines.unet(addition_embed_type="text"), text)
        with pytest.raises(HoldfastError, match=r"network is a Linear; expected one of UNet2DConditionModel, PixArt"):
            TextToImage(torch.nn.Linear(2, 2), text)

    def test_odd_sides_for_flux(self):
        with pytest.raises(HoldfastError, match="there are 3 x 4; set image_size"):
            packed(torch.zeros(1, 4, 3, 4))


def loaded_pixels():
    from holdfast.tasks import load_task

    return load_task(TASK)


class TestSmallModel:
    def test_its_parts_open_in_diffusers_one_by_one(self, tmp_path):
        from holdfast.tasks import load_task

        task = load_task("digits[0-2]@kind=text-to-image,schedule=flow,train_limit=20,test_limit=20")
        spec = ModelSpec(name="text-unet", options={"widths": [8, 8], "schedule": "flow"})
        model = load_model(spec, task)
        folder = model.save_pretrained(tmp_path / "parts")
        network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        batch = next(task.sweep("test", 4, device=CPU))
        t = batch.x[:, -1, 0, 0].long()
        text = model.text(task.caption_ids(task.labels("test")[:4])).states
        with torch.no_grad():
            flow = network(batch.x[:, :1], scheduler.timesteps.flip(0)[t], text).sample
            sigma = scheduler.sigmas.flip(0)[t].view(-1, 1, 1, 1)
            assert torch.allclose(model(batch.x), batch.x[:, :1] + (1 - sigma) * flow, atol=1e-5)
        with pytest.raises(HoldfastError, match="without an autoencoder, for which diffusers has no pipeline"):
            model.pipeline()
