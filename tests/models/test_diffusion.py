from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.errors import HoldfastError
from holdfast.models import Denoiser, ModelSpec, architecture_differences, load_model, load_released
from holdfast.runtime.run import Run
from holdfast.tasks import Batch, Schedule, load_task
from holdfast.training import PretrainSpec, Strategy, finetune, prepare, pretrain

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


@pytest.fixture
def task(digit_images):
    return digit_images[0]


def network(**change):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**{**TINY, **change})


def saved(folder, scheduler=None, **change):
    """A folder that diffusers writes, without Holdfast."""
    made = scheduler if scheduler is not None else diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(network(**change), made).save_pretrained(folder)
    return folder


def image(pipeline, steps=4):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np"
    ).images


def edited(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


class TestFolders:
    def test_diffusers_opens_a_saved_folder_and_draws_the_same_samples(self, denoiser, tmp_path):
        folder = denoiser.save_pretrained(tmp_path / "pipeline")
        plain = diffusers.DDPMPipeline.from_pretrained(folder)
        assert np.abs(image(plain) - image(denoiser.pipeline())).max() < 1e-5
        assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
        assert plain.scheduler.config.beta_schedule == "linear"

    @pytest.mark.parametrize("prefix", ["", "diffusers:"])
    def test_holdfast_opens_a_folder_of_diffusers(self, task, tmp_path, prefix):
        folder = saved(tmp_path / "ddpm")
        model = load_released(f"{prefix}{folder}", None, task)
        assert isinstance(model, Denoiser)
        assert (model.name, model.notes) == ("diffusers:ddpm", ())
        batch = next(task.sweep("test", 4, device=CPU))
        with torch.no_grad():
            plain = diffusers.UNet2DModel.from_pretrained(folder / "unet")
            assert torch.allclose(model(batch.x), plain(batch.x[:, :1], batch.x[:, -1, 0, 0]).sample, atol=1e-6)

    def test_a_ddim_folder_stays_one(self, task, tmp_path):
        folder = tmp_path / "ddim"
        diffusers.DDIMPipeline(network(), diffusers.DDIMScheduler()).save_pretrained(folder)
        model = load_released(str(folder), None, task)
        model.save_pretrained(tmp_path / "again")
        assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again"), diffusers.DDIMPipeline)
        assert isinstance(load_model("unet", task).pipeline(ddim=True), diffusers.DDIMPipeline)

    def test_our_own_file_carries_all_that_is_needed(self, task, tmp_path):
        """Without the folder: architecture and scheduler are in the header of the weights."""
        folder = saved(tmp_path / "ddpm", diffusers.DDPMScheduler(prediction_type="v_prediction"))
        model = load_released(str(folder), None, task)
        model.save(tmp_path / "model.safetensors")
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        again = load_released(str(tmp_path / "model.safetensors"), None, task)
        assert isinstance(again, Denoiser)
        assert again.predicts == "v_prediction"
        assert again.facts().sha256 == model.facts().sha256
        assert task.score(again) == task.score(model)

    def test_averaged_weights_are_mentioned_and_can_be_had(self, task, tmp_path):
        folder = saved(tmp_path / "ddpm")
        averaged = network()
        with torch.no_grad():
            averaged.conv_out.bias.fill_(0.25)
        averaged.save_pretrained(folder / "unet_ema")
        model = load_released(str(folder), None, task)
        assert "averaged weights (EMA) in unet_ema" in model.notes[0]
        assert (model.head.bias != 0.25).all()
        file = str(folder / "unet_ema" / "diffusion_pytorch_model.safetensors")
        assert (load_released(str(folder), file, task).head.bias == 0.25).all()

    def test_a_folder_of_another_kind_is_refused(self, task, tmp_path):
        folder = saved(tmp_path / "ddpm")
        edited(folder / "model_index.json", _class_name="StableVideoDiffusionPipeline",
               unet=["diffusers", "UNetSpatioTemporalConditionModel"])  # fmt: skip
        with pytest.raises(HoldfastError, match=r"StableVideo.*UNetSpatioTemporal.*unconditional.*StableDiffusionXL"):
            load_released(str(folder), None, task)

    @pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, "\xff"])
    @pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
    def test_damaged_json_is_a_clear_error(self, task, tmp_path, file, text):
        folder = saved(tmp_path / "ddpm")
        (folder / file).write_text(text, encoding="latin-1")
        with pytest.raises(
            HoldfastError,
            match=r"not a folder of a diffusers|cannot be loaded as a UNet2DModel|is not a scheduler's configuration",
        ):
            load_released(str(folder), None, task)

    def test_pickled_weights_are_not_opened(self, task, tmp_path):
        folder = tmp_path / "ddpm"
        diffusers.DDPMPipeline(network(), diffusers.DDPMScheduler()).save_pretrained(folder, safe_serialization=False)
        assert (folder / "unet" / "diffusion_pytorch_model.bin").is_file()
        with pytest.raises(HoldfastError, match="cannot be loaded as a UNet2DModel in safetensors"):
            load_released(str(folder), None, task)

    def test_missing_weights_and_weights_of_another_network(self, task, tmp_path):
        folder = saved(tmp_path / "ddpm")
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "conv_in.weight": torch.zeros(4, 1, 3, 3)}, file)
        with pytest.raises(HoldfastError, match="cannot be loaded as a UNet2DModel"):
            load_released(str(folder), None, task)
        save_file({k: v for k, v in tensors.items() if k != "conv_in.weight"}, file)
        with pytest.raises(HoldfastError, match=r"has no weights for conv_in\.weight"):
            load_released(str(folder), None, task)
        file.unlink()
        with pytest.raises(HoldfastError, match="cannot be loaded as a UNet2DModel"):
            load_released(str(folder), None, task)

    def test_another_scheduler_is_refused(self, task, tmp_path):
        folder = saved(tmp_path / "ddpm")
        diffusers.ScoreSdeVeScheduler().save_pretrained(folder / "scheduler")
        with pytest.raises(HoldfastError, match=r"Unknown scheduler 'ScoreSdeVeScheduler'.*Known: DDIMScheduler"):
            load_released(str(folder), None, task)

    def test_code_of_others_is_not_run(self, task, tmp_path):
        folder = saved(tmp_path / "ddpm")
        (folder / "unet" / "evil.py").write_text("raise SystemExit('ran')")
        edited(folder / "model_index.json", unet=["evil", "UNet2DModel"])
        with pytest.raises(HoldfastError, match="expected an unconditional one"):
            load_released(str(folder), None, task)


class TestRefusals:
    def test_a_variance_or_a_class(self, task):
        with pytest.raises(HoldfastError, match="predict a variance"):
            Denoiser(network(out_channels=2))
        with pytest.raises(HoldfastError, match="needs the class"):
            Denoiser(network(class_embed_type=None, num_class_embeds=10))
        with pytest.raises(HoldfastError, match="needs the class"):
            Denoiser(network(class_embed_type="timestep"))

    def test_an_unknown_prediction(self):
        with pytest.raises(HoldfastError, match=r"prediction_type.*Known: epsilon, sample, v_prediction"):
            Denoiser(network(), scheduler={"prediction_type": "flow"})

    def test_a_network_without_a_last_convolution(self):
        with pytest.raises(HoldfastError, match="no last convolution 'conv_out'"):
            Denoiser(torch.nn.Linear(2, 2))

    def test_the_noise_of_another_schedule(self, task, tmp_path):
        folder = saved(tmp_path / "ddpm", diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
        with pytest.raises(HoldfastError, match=r"trained on the noise schedule squaredcos_cap_v2, 1000.*has linear"):
            load_released(str(folder), None, task)
        cosine = load_task(f"digits[0-4]@kind=denoising,schedule={folder}")
        assert load_released(str(folder), None, cosine).schedule.same_noise(cosine.schedule)
        spec = ModelSpec(name="unet", options={"schedule": "squaredcos_cap_v2"})
        assert load_model(spec, cosine).schedule.same_noise(cosine.schedule)

    def test_a_file_carries_the_schedule_and_not_the_folder_that_it_was_in(self, tmp_path):
        folder = saved(tmp_path / "ddpm", diffusers.DDPMScheduler(50, beta_schedule="squaredcos_cap_v2"))
        cosine = load_task(f"digits[0-4]@kind=denoising,schedule={folder}")
        model = load_model(ModelSpec(name="unet", options={"widths": [8], "schedule": str(folder)}), cosine)
        model.save(tmp_path / "model.safetensors")
        shutil.rmtree(folder)
        again = load_released(str(tmp_path / "model.safetensors"), None, cosine)
        assert again.schedule.same_noise(cosine.schedule)
        assert str(tmp_path) not in json.dumps(again.spec)
        assert again.fresh().num_outputs == 1

    def test_images_of_another_kind(self, denoiser, tmp_path):
        colour = load_task("digits[0-4]@kind=denoising,channels=3")
        folder = saved(tmp_path / "ddpm")
        with pytest.raises(HoldfastError, match="channels"):
            load_released(str(folder), None, colour)
        with pytest.raises(HoldfastError, match="set image_size"):
            load_model("unet", load_task("digits[0-4]@kind=denoising,image_size=9"))
        with pytest.raises(HoldfastError, match="U-Net is for denoising"):
            load_model("unet", load_task("digits[0-4]"))
        with pytest.raises(HoldfastError, match=r"is a denoiser: .* task 'digits.0-4.' needs one vector"):
            load_released(str(folder), None, load_task("digits[0-4]"))

    def test_an_extractor(self, denoiser):
        with pytest.raises(HoldfastError, match="linear extractor goes before a linear head"):
            denoiser.clone().add_extractor()

    @pytest.mark.parametrize("widths", [[], [4], [8, 7]])
    def test_stages_that_are_too_narrow(self, task, widths):
        with pytest.raises(HoldfastError, match="of 8 or more channels each"):
            load_model(ModelSpec(name="unet", options={"widths": widths}), task)

    @pytest.mark.parametrize("setting", [{"head": "conv_in"}, {"mean": (0.5,), "std": (0.5,)}], ids=["head", "mean"])
    def test_settings_without_effect_are_refused(self, task, setting):
        with pytest.raises(HoldfastError, match="leave head, mean and std out"):
            load_model(ModelSpec(name="unet", **setting), task)
        assert load_model(ModelSpec(name="unet", head="conv_out"), task).head_name == "conv_out"

    def test_another_number_of_channels(self, denoiser):
        with pytest.raises(HoldfastError, match="images of 1 channels, and 3 are needed"):
            denoiser.clone().reset_head(3)


class Truth(torch.nn.Module):
    """Stands for a network with a perfect prediction."""

    def __init__(self, plain, answer):
        super().__init__()
        self.config, self.conv_out, self.answer = plain.config, plain.conv_out, answer

    def forward(self, x, t):
        return type("Output", (), {"sample": self.answer})()


class TestPredictions:
    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_the_noise_is_computed_from_every_kind_of_prediction(self, kind):
        """By a task's own inputs, against the definitions: v = sqrt(a) epsilon - sqrt(1 - a) x_0."""
        schedule = Schedule({"prediction_type": kind})
        generator = torch.Generator().manual_seed(0)
        x0, noise = (torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        t = torch.tensor([0, 5, 100, 500, 900, 999])
        a = schedule.alpha_bar.double()[t].view(-1, 1, 1, 1)
        answer = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0, "sample": x0}[kind]
        model = Denoiser(Truth(network(), answer), scheduler=schedule.config)
        model.precision = torch.float64
        found = model(schedule.noised(x0, t, noise).double())
        assert torch.allclose(found, noise, atol=1e-4 if kind == "sample" else 1e-6)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
    def test_training_descends_the_error_of_the_networks_own_prediction(self, kind):
        """As the training examples of diffusers do: v by the scheduler's `get_velocity`, noise - x_0 in a flow."""
        schedule = Schedule.named("flow") if kind == "flow" else Schedule({"prediction_type": kind})
        task = load_task("digits@kind=denoising").with_schedule(schedule)
        model = Denoiser(network(), scheduler=schedule.config)
        x0, t = task.images("train")[:6], torch.tensor([1, 5, 100, 500, 900, 998])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        x = schedule.noised(x0, t, noise)
        target = {"epsilon": noise, "sample": x0, "flow": noise - x0}.get(kind)
        if target is None:
            target = schedule.scheduler().get_velocity(x0, noise, t)
        wanted = (model.network(x[:, :-1], schedule.network_time(t)).sample - target).square().mean()
        found = task.loss(model, Batch(x, noise))
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
        ours, theirs = (torch.autograd.grad(loss, model.network.conv_out.weight)[0] for loss in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("kind", ["v_prediction", "flow"])
    def test_half_precision_does_not_amplify_rounding_in_the_loss(self, kind):
        schedule = Schedule.named("flow") if kind == "flow" else Schedule({"prediction_type": kind})
        task = load_task("digits@kind=denoising").with_schedule(schedule)
        batch = next(task.sweep("test", 200, device=CPU))
        wide, half = (Denoiser(network(), scheduler=schedule.config).eval() for _ in "ab")
        half.to(torch.bfloat16)
        with torch.no_grad():
            wanted, found = (model.prediction_errors(batch.x, batch.y) for model in (wide, half))
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.05 * wanted.norm()
        assert (found - wanted).abs().max() < 0.2 * wanted.mean()

    def test_a_step_of_noise_alone_has_no_infinite_loss(self):
        schedule = Schedule({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
        task = load_task("digits@kind=denoising").with_schedule(schedule)
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        x = schedule.noised(task.images("train")[:2], torch.tensor([999, 998]), noise)
        model = Denoiser(network(), scheduler=schedule.config)
        loss = task.loss(model, Batch(x, noise))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [*model.parameters()], allow_unused=True))

    @pytest.mark.parametrize("kind", ["v_prediction", "sample"])
    def test_half_precision_does_not_round_the_noise_away(self, denoiser, task, kind):
        x = next(task.sweep("test", 8, device=CPU)).x
        x[:, -1] = torch.arange(8).view(-1, 1, 1)  # the first steps, where alpha-bar is almost 1
        wide, half = (Denoiser(denoiser.clone().network, scheduler={"prediction_type": kind}).eval() for _ in "ab")
        half.to(torch.bfloat16)
        with torch.no_grad():
            expected, found = wide(x), half(x)
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.05 * expected.norm()

    def test_time_steps_reach_the_network_whole_in_any_precision(self, task):
        """bfloat16 cannot represent 999."""
        seen = []
        model = Denoiser(network()).to(torch.bfloat16)
        model.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        batch = next(task.sweep("test", 200, device=CPU))
        model(batch.x)
        assert torch.equal(seen[0], batch.x[:, -1, 0, 0].long())

    @pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-6), (torch.bfloat16, 3e-2)])
    def test_other_precisions(self, denoiser, task, dtype, near):
        other = denoiser.clone().to(dtype)
        assert other.dtype == dtype
        assert task.score(other) == pytest.approx(task.score(denoiser), rel=near)
        fresh = other.fresh()
        assert fresh.dtype == dtype


class TestReading:
    def test_schedule_and_prediction_type_identify_a_denoiser(self, task):
        one, other = (Denoiser(network(), scheduler={"prediction_type": k}) for k in ("epsilon", "v_prediction"))
        assert one.facts().sha256 == other.facts().sha256
        assert one.input_settings() != other.input_settings()
        assert architecture_differences(one, other) == [
            "Its scheduler's prediction_type is epsilon instead of v_prediction."
        ]
        assert architecture_differences(one, one.clone()) == []


class TestParts:
    def test_a_fresh_head_moves_the_head_alone_and_keeps_its_shape(self, denoiser):
        model = denoiser.clone()
        with torch.random.fork_rng():
            model.reset_head()
        before, after = denoiser.network.state_dict(), model.network.state_dict()
        assert {k for k in before if not torch.equal(before[k], after[k])} == {"conv_out.weight", "conv_out.bias"}
        assert before["conv_out.weight"].shape == after["conv_out.weight"].shape

    def test_blocks_are_in_the_order_in_which_they_run(self, denoiser, task):
        names = [block[0][0] for block in denoiser.blocks()]
        ran = []
        model = denoiser.clone()
        for name in names:
            model.network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        model(next(task.sweep("test", 2, device=CPU)).x)
        assert ran == names
        assert [n for n, _ in denoiser.blocks()[-1]] == ["up_blocks.1", "conv_norm_out", "conv_act"]

    @pytest.mark.parametrize("source", ["built in", "folder"])
    def test_fresh_is_the_same_architecture_with_other_weights(self, denoiser, task, tmp_path, source):
        model = denoiser if source == "built in" else load_released(str(saved(tmp_path / "ddpm")), None, task)
        with torch.random.fork_rng():
            one, other = model.fresh(), model.fresh()
        shapes = {k: v.shape for k, v in model.network.state_dict().items()}
        assert {k: v.shape for k, v in one.network.state_dict().items()} == shapes
        assert len({m.facts().sha256 for m in (model, one, other)}) == 3
        assert list(one.network.state_dict()) == list(model.network.state_dict())
        assert isinstance(one, Denoiser)

    def test_adapters_of_attention_are_beside_attention_alone(self, denoiser, task):
        places = {}
        for scope in ("lora", "lora-attention"):
            model, strategy = denoiser.clone(), Strategy("direct", scope, "adamw", 1e-2, 20)
            with torch.random.fork_rng():
                prepare(model, strategy, task)
            before = {k: v.clone() for k, v in model.network.state_dict().items()}
            next(finetune(model, task, strategy, generator=torch.Generator().manual_seed(0), device=CPU))
            moved = {k for k, v in model.network.state_dict().items() if not torch.equal(v, before[k])}
            assert all("lora_" in name or name.startswith("conv_out.") for name in moved)
            places[scope] = {name.split(".lora_")[0] for name in moved if "lora_" in name}
        assert places["lora-attention"]
        assert all(".attentions." in name for name in places["lora-attention"])
        assert places["lora-attention"] < places["lora"]

    def test_a_model_without_attention_is_refused(self, model, restricted):
        from holdfast.training import not_applicable

        reason = not_applicable(Strategy("head", "lora-attention"), model, restricted)
        assert reason == "its attention has no linear or convolutional layer that takes adapters"


class TestAveraging:
    def test_pretraining_keeps_the_average_of_the_weights(self, denoiser, task):
        decay, steps = 0.8, 4
        strategy = Strategy("direct", "all", "adam", 1e-2, 20)
        run = Run(0, CPU)
        found = pretrain(denoiser, task, steps=steps, strategy=strategy, ema=decay, run=run)

        twin, average = denoiser.clone(), None
        with run.seeded("pretrain") as generator:
            training = finetune(twin, task, strategy, generator=generator, device=CPU)
            for _ in range(steps):
                next(training)
                now = [p.detach().clone() for p in twin.parameters()]
                average = now if average is None else [
                    decay * a + (1 - decay) * p for a, p in zip(average, now, strict=True)
                ]  # fmt: skip
        for mine, expected in zip(found.parameters(), average, strict=True):
            assert torch.allclose(mine, expected, rtol=1e-5, atol=1e-7)
        assert not found.training

    @pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
    def test_a_decay_is_between_0_and_1(self, decay):
        with pytest.raises(ValueError, match="ema"):
            PretrainSpec(ema=decay)


class TestAJobsFolder:
    def test_an_immunized_denoiser_is_written_for_diffusers_as_well(self, denoiser, digit_images, tmp_path):
        import holdfast

        settings = {"iterations": 1, "steps": 1, "max_benign_drop": 1.0, "batch_sizes": (10,)}
        benign, restricted = digit_images
        made = holdfast.immunize(
            denoiser, benign=benign, restricted=restricted, folder=tmp_path / "out", device="cpu", **settings
        )
        again = load_released(str(Path(tmp_path / "out" / "pipeline")), None, benign)
        own = load_released(str(Path(tmp_path / "out" / "model.safetensors")), None, benign)
        assert benign.score(again) == benign.score(own) == benign.score(made)
