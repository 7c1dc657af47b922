"""Flow matching: x_t = (1 - sigma) x_0 + sigma epsilon, and networks that predict epsilon - x_0."""

from __future__ import annotations

import pytest
import torch

from holdfast.defenses.sophon.sampling import SamplingStates
from holdfast.errors import HoldfastError
from holdfast.metrics.generation import restore
from holdfast.models import Denoiser, ModelSpec, load_model, load_released
from holdfast.tasks import Schedule, load_task

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
SHIFTED = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(5, 1, 4, 4, generator=generator) for _ in range(2))


class Truth(torch.nn.Module):
    """Stands for a network with a perfect prediction."""

    def __init__(self, plain, answer):
        super().__init__()
        self.config, self.conv_out, self.answer, self.times = plain.config, plain.conv_out, answer, []

    def forward(self, x, t):
        self.times.append(t)
        return type("Output", (), {"sample": self.answer})()


@pytest.fixture(scope="module")
def task():
    return load_task("digits[0-4]@kind=denoising,schedule=flow,train_limit=40,test_limit=20")


@pytest.fixture(scope="module")
def model(task):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_model(ModelSpec(name="unet", options={"widths": [8, 8], "schedule": "flow"}), task)


class TestSchedule:
    @pytest.mark.parametrize("config", [{"_class_name": "FlowMatchEulerDiscreteScheduler"}, SHIFTED], ids=str)
    def test_the_forward_process_is_that_of_diffusers(self, config):
        schedule, scheduler = Schedule(config), diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        x0, noise = pair()
        t = torch.tensor([0, 10, 400, 900, 999])
        times = schedule.network_time(t)
        found = schedule.noised(x0, t, noise)
        assert torch.allclose(found[:, :-1], scheduler.scale_noise(x0, times, noise), atol=1e-6)
        assert torch.equal(found[:, -1, 0, 0], t.float())
        assert schedule.sigma[-1] == 1
        assert schedule.restorable == 999
        assert torch.allclose(schedule.alpha_bar[t].sqrt(), schedule.shares(t, CPU)[0].flatten(), atol=1e-6)

    def test_a_step_back_is_that_of_eulers_method(self):
        schedule, scheduler = Schedule(SHIFTED), diffusers.FlowMatchEulerDiscreteScheduler.from_config(SHIFTED)
        x, flow = pair()
        scheduler.set_timesteps(sigmas=[0.75, 0.5], num_inference_steps=2)
        now, then = ((schedule.sigma - sigma).abs().argmin().repeat(5) for sigma in scheduler.sigmas[:2])
        expected = scheduler.step(flow, scheduler.timesteps[0], x).prev_sample
        noise = x + (1 - schedule.sigma[now].view(-1, 1, 1, 1)) * flow
        found, clean = schedule.step_back(x, noise, now, then)
        assert torch.allclose(schedule.sigma[now[0]], scheduler.sigmas[0], atol=1e-6)
        assert torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(clean, noise - flow, atol=1e-4)
        assert clean.abs().max() > 1  # not clipped

    def test_it_is_told_from_diffusion(self):
        flow, shifted = Schedule.named("flow"), Schedule(SHIFTED)
        assert flow.same_noise(Schedule.named("flow"))
        assert not flow.same_noise(shifted)
        assert not flow.same_noise(Schedule())
        before = torch.cat([torch.ones(1), flow.alpha_bar[:-1]])
        diffusion = Schedule({"trained_betas": (1 - flow.alpha_bar / before).tolist()})
        assert torch.allclose(diffusion.alpha_bar, flow.alpha_bar, atol=1e-5)
        assert not diffusion.same_noise(flow)
        assert shifted.describe() == "flow matching, 1000 steps, shift 3"
        hashes = {load_task(f"digits[0-1]@kind=denoising,schedule={n}").facts().sha256 for n in ("flow", "linear")}
        assert len(hashes) == 2

    @pytest.mark.parametrize(
        "change", [{"shift": 0.0}, {"shift": -1.0}, {"shift": float("nan")}, {"num_train_timesteps": 0},
                   {"invert_sigmas": True}], ids=str,
    )  # fmt: skip
    def test_schedules_that_are_none_are_refused(self, change):
        with pytest.raises(HoldfastError, match=r"must rise from above 0|refused by diffusers"):
            Schedule({**SHIFTED, **change})

    @pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
    def test_other_samplers_share_the_noise_of_training(self, name, tmp_path):
        kind = getattr(diffusers, name)
        kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(tmp_path)
        schedule = Schedule.named(str(tmp_path))
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        assert torch.equal(schedule.alpha_bar, diffusers.DDPMScheduler(**betas).alphas_cumprod)
        assert schedule.config["clip_sample"] is False
        assert type(schedule.scheduler()) is kind


class TestTask:
    def test_the_reference_is_the_best_linear_denoiser(self, task):
        """Its error is that of the slope b / (a^2 s^2 + b^2) in closed form, and other slopes have larger ones."""
        x0 = task.images("test").double()
        variance = x0.var(correction=0)
        for t in (50, 500, 950):
            sigma = float(task.schedule.sigma[t])
            slope = sigma / ((1 - sigma) ** 2 * variance + sigma**2)
            error = (slope * (1 - sigma)) ** 2 * variance + (1 - slope * sigma) ** 2
            one = task.with_timesteps([t])
            assert one.chance == pytest.approx(float(error), rel=0.1)
            for worse in (0.9, 1.1):
                other = worse * slope
                assert (other * (1 - sigma)) ** 2 * variance + (1 - other * sigma) ** 2 > error

    def test_a_perfect_prediction_has_no_error(self, task, model):
        x0, noise = pair()
        t = torch.tensor([0, 5, 500, 998, 999])
        truth = Truth(model.network, noise - x0)
        perfect = Denoiser(truth, scheduler=task.schedule.config)
        assert perfect.predicts == "flow"
        assert torch.allclose(perfect(task.schedule.noised(x0, t, noise)), noise, atol=1e-5)
        assert torch.allclose(truth.times[0], (t + 1).float())

    def test_half_precision(self, task, model):
        x = next(task.sweep("test", 8, device=CPU)).x
        half = model.clone().to(torch.bfloat16)
        with torch.no_grad():
            wide, found = model(x), half(x)
        assert found.dtype == torch.bfloat16
        assert (found - wide).norm() < 0.05 * wide.norm()


class TestModel:
    def test_saved_and_loaded(self, task, model, tmp_path):
        model.save(tmp_path / "model.safetensors")
        again = load_released(str(tmp_path / "model.safetensors"), None, task)
        assert task.score(again) == task.score(model)
        folder = model.save_pretrained(tmp_path / "parts")
        network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
        batch = next(task.sweep("test", 3, device=CPU))
        sigma = batch.x[:, -1:, :1, :1] / 1000 + 0.001
        with torch.no_grad():
            flow = network(batch.x[:, :1], 1000 * sigma.flatten()).sample
            assert torch.allclose(model(batch.x), batch.x[:, :1] + (1 - sigma) * flow, atol=1e-5)

    def test_it_is_refused_on_another_schedule(self, model):
        with pytest.raises(HoldfastError, match="flow matching, 1000 steps, shift 1, and its task"):
            model.check_schedule(Schedule(), "digits")
        with pytest.raises(HoldfastError, match="no pipeline for flow matching"):
            model.pipeline()

    def test_noise_is_removed_step_by_step(self, task, model):
        pictures = task.images("test")[:3] / 2 + 0.5
        assert restore(model, pictures, 500, seed=0, steps=3).shape == pictures.shape
        with pytest.raises(HoldfastError, match="expected 0 to 998"):
            restore(model, pictures, 999, seed=0)

    def test_the_states_of_sampling_go_from_noise_to_images(self, task, model):
        generator = torch.Generator().manual_seed(0)
        states = SamplingStates(task.schedule, (1, 8, 8), 3, device=CPU, generator=generator)
        assert bool((states.t <= 998).all())
        for _ in range(60):  # past an image's last step
            states.advance(states.x, generator)
        assert bool(states.x.isfinite().all())
