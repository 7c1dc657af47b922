"""Samples are those of diffusers' pipelines; what noise does and how it is taken away; the kernel distance."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel

import reference
from holdfast.errors import HoldfastError
from holdfast.metrics.generation import kernel_distance, noised, restore, sample
from holdfast.models import Denoiser
from holdfast.tasks import Schedule

LENGTH = 20
CONFIG = {"num_train_timesteps": LENGTH, "beta_end": 0.5}


def denoiser(**config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2DModel(
            8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, dropout=0.5,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return Denoiser(network, scheduler={**CONFIG, **config})


@pytest.fixture(scope="module")
def model():
    return denoiser()


def drawn(count=4, channels=3):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))


class TestSample:
    @pytest.mark.parametrize(
        ("pipeline", "ours", "theirs"),
        [
            (DDIMPipeline, {"steps": 5}, {"num_inference_steps": 5}),
            (DDIMPipeline, {"steps": 5, "eta": 0.7}, {"num_inference_steps": 5, "eta": 0.7}),
            (DDPMPipeline, {"steps": None}, {"num_inference_steps": LENGTH}),
        ],
        ids=["DDIM", "DDIM with noise", "DDPM"],
    )
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_a_released_folder_gives_the_same_in_plain_diffusers(self, tmp_path, prediction, pipeline, ours, theirs):
        model = denoiser(prediction_type=prediction)
        loaded = pipeline.from_pretrained(model.save_pretrained(tmp_path))
        loaded.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        expected = loaded(batch_size=3, generator=generator, output_type="pt", **theirs).images
        assert torch.equal(sample(model, 3, seed=7, **ours), expected)

    def test_batches_change_nothing_but_rounding(self, model):
        whole = sample(model, 5, seed=0, steps=4)
        torch.testing.assert_close(sample(model, 5, seed=0, steps=4, batch=2), whole, atol=1e-5, rtol=0)

    def test_only_the_seed_decides_and_nothing_is_touched(self, model):
        model.train()
        state = torch.get_rng_state()
        first, second, other = (sample(model, 2, seed=s, steps=3) for s in (0, 0, 1))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
        assert model.training
        assert model.network.conv_in.training
        assert torch.equal(torch.get_rng_state(), state)
        assert first.shape == (2, 3, 8, 8)
        assert 0 <= float(first.min()) <= float(first.max()) <= 1
        model.eval()
        sample(model, 1, seed=0, steps=1)
        assert not model.training

    @pytest.mark.parametrize(
        "bad", [{"steps": 0}, {"steps": LENGTH + 1}, {"eta": 2.0}, {"batch": 0}], ids=lambda bad: next(iter(bad))
    )
    def test_what_cannot_work_is_refused(self, model, bad):
        with pytest.raises(HoldfastError, match="expected"):
            sample(model, 1, **{"seed": 0, "steps": 1, **bad})

    def test_a_network_of_no_size_is_refused(self, model):
        other = model.clone()
        other.network.register_to_config(sample_size=None)
        with pytest.raises(HoldfastError, match="set sample_size"):
            sample(other, 1, seed=0, steps=1)


class TestRestore:
    @pytest.mark.parametrize("clip", [True, False])
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    def test_the_way_back_is_ddims(self, clip, prediction):
        """Where its own grid of steps goes through t."""
        model = denoiser(clip_sample=clip, prediction_type=prediction).eval()
        scheduler = DDIMScheduler(**CONFIG, clip_sample=clip, prediction_type=prediction)
        scheduler.set_timesteps(10)
        noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        x = scheduler.add_noise(2 * drawn() - 1, noise, torch.tensor([12] * 4))
        with torch.no_grad():
            for now in [int(step) for step in scheduler.timesteps if step <= 12]:
                x = scheduler.step(model.network(x, now).sample, now, x).prev_sample
        found = restore(model, drawn(), 12, seed=3, steps=7)
        torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)

    def test_who_knows_the_noise_gets_the_picture_back(self, model, monkeypatch):
        def oracle(x):
            a, clean = model.schedule.alpha_bar[x[:, -1:].long()], 2 * drawn() - 1
            return (x[:, :-1] - a.sqrt() * clean) / (1 - a).sqrt()

        monkeypatch.setattr(model, "forward", oracle)
        torch.testing.assert_close(restore(model, drawn(), LENGTH - 1, seed=0, steps=4), drawn(), atol=1e-4, rtol=0)

    def test_only_the_seed_decides_and_nothing_is_touched(self, model):
        model.train()
        state = torch.get_rng_state()
        first, second = restore(model, drawn(), 5, seed=0), restore(model, drawn(), 5, seed=0, batch=3)
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
        assert not torch.allclose(first, restore(model, drawn(), 5, seed=1))
        assert model.training
        assert model.network.conv_in.training
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_network_that_gives_no_numbers_gives_none(self, model, monkeypatch):
        monkeypatch.setattr(model, "forward", lambda x: torch.full_like(x[:, :-1], torch.nan))
        assert restore(model, drawn(), 5, seed=0).isnan().all()

    def test_noise_grows_with_the_step(self):
        schedule = Schedule(CONFIG)
        changes = [float((noised(drawn(), t, schedule, seed=0) - drawn()).abs().mean()) for t in (0, 5, 19)]
        assert changes == sorted(changes)
        assert changes[0] < 0.01
        assert changes[2] > 0.2

    def test_where_nothing_is_left_nothing_can_be_restored(self):
        model = denoiser(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        with pytest.raises(HoldfastError, match="expected 0 to 18"):
            restore(model, drawn(), LENGTH - 1, seed=0)
        assert restore(model, drawn(), LENGTH - 2, seed=0).isfinite().all()

    def test_what_cannot_work_is_refused(self, model):
        with pytest.raises(HoldfastError, match="expected 0 to 19"):
            restore(model, drawn(), LENGTH, seed=0)
        with pytest.raises(HoldfastError, match="at least 1"):
            restore(model, drawn(), 1, seed=0, steps=0)


class TestKernelDistance:
    def test_it_is_the_papers(self):
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(9, 5, generator=generator), torch.rand(7, 5, generator=generator)
        assert kernel_distance(a, b).value == pytest.approx(reference.kernel_distance(a.double(), b.double()), rel=1e-9)

    def test_the_error_is_the_jackknifes(self):
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(6, 3, generator=generator).double(), torch.rand(5, 3, generator=generator).double()
        total = 0.0
        for one, parts in ((a, lambda rest: (rest, b)), (b, lambda rest: (a, rest))):
            left = [reference.kernel_distance(*parts(torch.cat([one[:i], one[i + 1 :]]))) for i in range(len(one))]
            total += (len(one) - 1) / len(one) * sum((v - sum(left) / len(left)) ** 2 for v in left)
        assert kernel_distance(a, b).error == pytest.approx(math.sqrt(total), rel=1e-9)

    def test_it_is_unbiased_and_its_error_is_about_right(self):
        generator = torch.Generator().manual_seed(0)
        same = [kernel_distance(*torch.randn(2, 40, 4, generator=generator)) for _ in range(200)]
        mean = sum(d.value for d in same) / len(same)
        spread = math.sqrt(sum((d.value - mean) ** 2 for d in same) / (len(same) - 1))
        assert abs(mean) < 3 * spread / math.sqrt(len(same))
        assert 0.5 < sum(d.error for d in same) / len(same) / spread < 2

    def test_a_feature_that_is_no_number_spoils_it(self):
        a = torch.rand(4, 2)
        assert all(math.isnan(v) for v in kernel_distance(torch.where(a == a[0, 0], torch.nan, a), torch.rand(4, 2)))

    def test_shapes_are_checked(self):
        with pytest.raises(HoldfastError, match=r"\(4, 2\) and \(4, 3\)"):
            kernel_distance(torch.rand(4, 2), torch.rand(4, 3))
        with pytest.raises(HoldfastError, match="at least 3"):
            kernel_distance(torch.rand(2, 2), torch.rand(4, 2))
