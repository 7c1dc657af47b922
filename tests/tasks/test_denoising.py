from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import reference
from holdfast.errors import HoldfastError
from holdfast.tasks import ArrayTask, DenoisingTask, Schedule, TaskSpec, load_task
from holdfast.tasks.denoising import BLOCK
from holdfast.tasks.schedule import SCHEDULES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> DenoisingTask:
    task = load_task("digits@kind=denoising")
    assert isinstance(task, DenoisingTask)
    return task


def noise_task(samples: int = 40, **more: object) -> DenoisingTask:
    """Images of random pixels, without labels."""
    x = np.random.default_rng(0).integers(0, 256, (samples + 20, 4, 4), dtype=np.uint8)
    y = np.zeros(samples + 20, dtype=int)
    return DenoisingTask("noise", x[:samples], y[:samples], x[samples:], y[samples:], **more)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Answers(nn.Module):
    """Returns a function of the inputs; its parameter gives it a device."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.answer(x)


def knows(task, split="test"):
    """A model that returns the true noise of a sweep, in order."""
    answers = torch.cat([batch.y for batch in task.sweep(split, 1000, device=CPU)])
    place = iter(range(0, 10**9, 500))

    def answer(x):
        start = next(place)
        return answers[start : start + len(x)]

    return Answers(answer)


class TestSchedule:
    def test_the_linear_one_is_the_closed_form(self):
        """Ho et al. 2020, section 4: beta from 1e-4 to 0.02, alpha-bar the product of 1 - beta."""
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        assert torch.allclose(Schedule().alpha_bar.double(), torch.cumprod(1 - beta, 0), rtol=1e-4)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_every_named_one_goes_from_image_to_noise(self, name):
        a = Schedule.named(name).alpha_bar
        assert a.shape == (1000,)
        assert (a[1:] < a[:-1]).all()
        assert a[0] > 0.99
        assert a[-1] < 0.01

    def test_noised_is_the_forward_process(self):
        x0, noise = (torch.randn(3, 2, 2, 3, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
        t = torch.tensor([0, 500, 999])
        x = Schedule().noised(x0, t, noise)
        assert torch.allclose(x[:, :-1], reference.noised(x0, t, noise, Schedule().alpha_bar.double()), rtol=1e-6)
        assert (x[:, -1] == t.view(3, 1, 1)).all()

    @pytest.mark.parametrize("where", ["", "scheduler", "scheduler/scheduler_config.json"])
    def test_a_folders_is_read(self, tmp_path, where):
        from diffusers import DDPMScheduler

        DDPMScheduler(50, beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "scheduler")
        found = Schedule.named(str(tmp_path / where))
        assert found.steps == 50
        assert found.describe().startswith("squaredcos_cap_v2, 50 steps")

    def test_configurations_that_are_not_schedules_are_refused(self, tmp_path):
        with pytest.raises(HoldfastError, match=r"did you mean 'linear'.*diffusers folder"):
            Schedule.named("linea")
        file = tmp_path / "scheduler_config.json"
        for text in ("{", "[]", json.dumps({"_class_name": "UNet2DModel"}), "[" * 100_000):
            file.write_text(text)
            with pytest.raises(HoldfastError, match="not a scheduler's configuration"):
                Schedule.named(str(tmp_path))
        with pytest.raises(HoldfastError, match="refused by diffusers"):
            Schedule({"beta_schedule": "cubic"})

    @pytest.mark.parametrize(
        "config",
        [{"num_train_timesteps": 0}, {"trained_betas": []}, {"beta_start": 0.0}, {"beta_end": float("nan")}],
        ids=str,
    )
    def test_schedules_without_noise_are_refused(self, config):
        with pytest.raises(HoldfastError, match="from 0 to below 1 at each"):
            Schedule(config)

    @pytest.mark.parametrize("name", [5, None])
    def test_a_name_is_a_text(self, name):
        with pytest.raises(HoldfastError, match="Unknown noise schedule"):
            Schedule.named(name)

    def test_schedules_are_the_same_by_their_noise(self):
        cosine = Schedule.named("squaredcos_cap_v2")
        assert Schedule().same_noise(Schedule({"prediction_type": "v_prediction", "clip_sample": False}))
        assert not Schedule().same_noise(cosine)
        assert not Schedule().same_noise(Schedule({"num_train_timesteps": 10}))


class TestBatches:
    def test_a_batch_is_a_noised_image_and_its_noise(self, digits):
        """Removing the noise gives images of the training set, in [-1, 1]."""
        batch = next(digits.batches("train", 30, generator=seeded(), device=CPU))
        t = batch.x[:, -1, 0, 0].long()
        a = digits.schedule.alpha_bar[t].view(-1, 1, 1, 1)
        x0 = (batch.x[:, :-1] - (1 - a).sqrt() * batch.y) / a.sqrt()
        early = t < 500  # later, too little of the image is left
        known = digits.images("train").flatten(1)
        assert early.sum() > 5
        assert torch.cdist(x0[early].flatten(1), known).min(1).values.max() < 1e-2
        assert known.min() == -1
        assert known.max() == 1

    def test_training_has_new_noise_and_steps_every_epoch_by_the_generator_alone(self, digits):
        def first(seed, n=3):
            batches = digits.batches("train", 500, generator=seeded(seed), device=CPU)
            return [next(batches) for _ in range(n)]

        for one, other in zip(first(0), first(0), strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)
        assert not torch.equal(first(0)[0].x, first(1)[0].x)
        steps = torch.cat([b.x[:, -1, 0, 0] for b in first(0)])
        assert steps.min() < 20
        assert steps.max() > 980
        assert len(steps.unique()) > 600

    def test_the_global_generator_is_left_alone(self, digits):
        before = torch.get_rng_state()
        next(digits.batches("train", 5, generator=seeded(), device=CPU))
        list(digits.sweep("test", 100, device=CPU))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("size", [1, 7, 300, BLOCK - 1, BLOCK, 5000])
    def test_test_noise_does_not_depend_on_the_batch_size(self, size):
        task = noise_task(BLOCK)
        whole = next(task.sweep("train", 10_000, device=CPU))
        parts = list(task.sweep("train", size, device=CPU))
        assert torch.equal(torch.cat([b.x for b in parts]), whole.x)
        assert torch.equal(torch.cat([b.y for b in parts]), whole.y)

    def test_test_noise_is_normal_and_every_images_own(self, digits):
        y = torch.cat([b.y for b in digits.batches("test", 100, device=CPU)])
        assert y.mean().abs() < 0.02
        assert abs(float(y.std()) - 1) < 0.02
        assert len(y.flatten(1).unique(dim=0)) == len(y)

    @pytest.mark.parametrize("count", [1, 3, 40, 1000, 2500])
    def test_time_steps_are_spread_evenly(self, count):
        t = noise_task()._fixed_steps(count).sort().values
        assert t.min() >= 0
        assert t.max() < 1000
        assert (t - (torch.arange(count) + 0.5) * 1000 / count).abs().max() <= 1


class TestTimesteps:
    def test_only_those_are_drawn_and_scored(self):
        task = load_task("digits@kind=denoising,timesteps=1+40")
        for batch in (next(task.batches("train", 64, generator=torch.Generator().manual_seed(0), device=CPU)),
                      next(task.sweep("test", 64, device=CPU))):  # fmt: skip
            assert sorted(batch.x[:, -1, 0, 0].unique().tolist()) == [1, 40]
        assert task.halves(0)[0].timesteps == (1, 40)
        assert task.facts().sha256 != load_task("digits@kind=denoising").facts().sha256

    def test_at_the_first_steps_noise_is_next_to_invisible(self):
        """What the released code of SOPHON measures: no linear denoiser does better than answering nothing."""
        assert load_task("digits@kind=denoising,timesteps=1").chance > 0.99

    @pytest.mark.parametrize("steps", ["1000", "-1", "3+3"])
    def test_what_the_schedule_does_not_have_is_refused(self, steps):
        with pytest.raises(HoldfastError, match="expected different ones from 0 to 999"):
            load_task(f"digits@kind=denoising,timesteps={steps}")

    def test_they_are_for_denoising(self):
        with pytest.raises(HoldfastError, match="timesteps is for kind=denoising"):
            load_task("digits@timesteps=1")


class TestScore:
    def test_it_is_the_mean_square_per_pixel(self, digits):
        silent = Answers(lambda x: torch.zeros_like(x[:, :-1]))
        y = torch.cat([b.y for b in digits.sweep("test", 100, device=CPU)])
        assert digits.score(silent) == pytest.approx(float(y.square().mean()))
        assert digits.outcomes(silent).shape == (digits.size("test"),)
        assert digits.outcomes(silent).dtype == torch.float64
        batch = next(digits.sweep("test", 20, device=CPU))
        assert digits.score_of(torch.zeros_like(batch.y), batch) == pytest.approx(float(batch.y.square().mean()))
        assert float(digits.loss(silent, batch)) == pytest.approx(digits.score_of(torch.zeros_like(batch.y), batch))

    def test_skill_of_the_true_noise_of_the_linear_denoiser_and_of_zeros(self, digits):
        assert digits.audit_score(knows(digits)) == 1
        silent = Answers(lambda x: torch.zeros_like(x[:, :-1]))
        assert digits.audit_score(silent) < -3
        assert (digits.audit_unit, digits.audit_chance, digits.higher_is_better) == ("skill", 0.0, False)

        images = digits.images("test").double()
        mean, variance = images.mean(), images.var(correction=0)

        def line(x):
            a = digits.schedule.alpha_bar.double()[x[:, -1:, :1, :1].long()]
            return (1 - a).sqrt() * (x[:, :-1] - a.sqrt() * mean) / (a * variance + 1 - a)

        assert digits.audit_score(Answers(line)) == pytest.approx(0, abs=1e-9)

    def test_chance_is_the_best_line(self):
        """Least squares of the noise on the noised pixels, at one time step and with many draws."""
        x = np.random.default_rng(0).integers(0, 200, (5000, 2, 2), dtype=np.uint8)
        task = DenoisingTask("big", x[:10], np.zeros(10, int), x, np.zeros(5000, int))
        images = task.images("test").double().flatten()
        for step in (50, 400, 900):
            a = float(task.schedule.alpha_bar[step])
            noise = torch.randn(images.shape, generator=seeded(), dtype=torch.float64)
            noised = a**0.5 * images + (1 - a) ** 0.5 * noise
            design = torch.stack([noised, torch.ones_like(noised)], 1)
            best = (design @ torch.linalg.lstsq(design, noise).solution - noise).square().mean()
            variance = float(images.var(correction=0))
            assert best == pytest.approx(a * variance / (a * variance + 1 - a), rel=0.05)
        a = task.schedule.alpha_bar.double()
        expected = (a * variance / (a * variance + 1 - a)).mean()
        assert task.chance == pytest.approx(float(expected), rel=0.05)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_one_output_that_is_not_finite_makes_all_nan(self, digits, bad):
        def answer(x):
            out = torch.zeros_like(x[:, :-1])
            out[0, 0, 0, 0] = bad
            return out

        assert digits.outcomes(Answers(answer)).isnan().all()

    def test_the_models_mode_is_kept_and_scores_are_taken_in_evaluation(self, digits):
        modes = []
        model = Answers(lambda x: modes.append(model.training) or torch.zeros_like(x[:, :-1]))
        digits.score(model.train())
        assert model.training
        assert set(modes) == {False}


class TestParts:
    def test_halves_are_disjoint_and_share_test_and_schedule(self):
        task = load_task(TaskSpec(data="digits[5-9]", kind="denoising", schedule="squaredcos_cap_v2"))
        one, other = task.halves(0)
        images = [{x.numpy().tobytes() for x in half.images("train")} for half in (one, other)]
        assert not images[0] & images[1]
        assert one.size("train") + other.size("train") == task.size("train")
        assert one.schedule.same_noise(task.schedule)
        assert one.chance == other.chance == task.chance
        plain = load_task("digits[5-9]").halves(0)[0]
        assert torch.equal(one._x["train"], plain._x["train"])

    def test_shots_are_of_images_and_not_of_classes(self, digits):
        assert digits.few_shot(13, 0).size("train") == 13
        assert not torch.equal(digits.few_shot(13, 0).images("train"), digits.few_shot(13, 1).images("train"))
        with pytest.raises(HoldfastError, match=r"shots is 5000, and the whole task, .* has 1352 training samples"):
            digits.few_shot(5000, 0)

    def test_holdout_and_limit(self, digits):
        rest, held = digits.holdout(0.1, 0)
        assert held.size("test") == 135
        assert rest.size("train") == held.size("train") == digits.size("train") - 135
        assert held.chance != digits.chance
        assert rest.chance == digits.chance
        small = digits.limit_test(30, 0)
        assert small.size("test") == 30
        steps = torch.cat([b.x[:, -1, 0, 0] for b in small.sweep("test", 8, device=CPU)]).sort().values
        assert (steps.diff() - 1000 / 30).abs().max() <= 1  # evenly, also for fewer images

    def test_sizes_and_channels(self):
        task = load_task("digits[0-4]@kind=denoising,image_size=16,channels=3")
        assert (task.input_shape, task.output_shape, task.num_outputs) == ((4, 16, 16), (3, 16, 16), 3)
        assert task.class_names == ["0", "1", "2", "3", "4"]
        assert torch.equal(task.labels("test"), load_task("digits[0-4]")._y["test"])

    def test_other_noise_makes_another_task_of_the_same_images(self, digits):
        other = digits.with_schedule(Schedule.named("squaredcos_cap_v2"))
        assert torch.equal(other.images("test"), digits.images("test"))
        assert other.chance != digits.chance
        assert other.facts().sha256 != digits.facts().sha256
        assert load_task("digits@kind=denoising").facts() == digits.facts()
        assert load_task("digits").facts().sha256 != digits.facts().sha256

    def test_it_is_the_same_after_a_pickle(self, digits):
        twin = pickle.loads(pickle.dumps(digits))
        assert twin.facts() == digits.facts()
        for one, other in zip(digits.sweep("test", 200, device=CPU), twin.sweep("test", 200, device=CPU), strict=True):
            assert torch.equal(one.x, other.x)

    def test_probes_are_refused(self, digits):
        with pytest.raises(HoldfastError, match="a probe on features does not apply"):
            digits.with_inputs(torch.zeros(1), torch.zeros(1))


class TestSources:
    def save(self, folder, count=8):
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (20 * i, 0, 255)).save(folder / f"{i}.png")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(HoldfastError, match="no sub-folders and no images"):
            load_task(f"{tmp_path}@kind=denoising")

    @pytest.mark.parametrize("value", [0, 255])
    def test_test_images_without_anything_on_them(self, value):
        x = np.random.default_rng(0).integers(0, 256, (8, 4, 4), dtype=np.uint8)
        with pytest.raises(HoldfastError, match="all pixels of its test images are the same"):
            DenoisingTask("mine", x, [0] * 8, np.full_like(x, value), [0] * 8)

    def test_inputs_that_are_not_images(self, tmp_path):
        np.savez(tmp_path / "number.npz", x_train=np.float32(3), x_test=np.float32(3))
        with pytest.raises(HoldfastError, match="x_train"):
            load_task("number@kind=denoising", data_dir=tmp_path)

    def test_a_flat_folder(self, tmp_path):
        self.save(tmp_path / "faces")
        task = load_task(f"{tmp_path}/faces@kind=denoising")
        assert (task.size("train"), task.size("test"), task.input_shape) == (6, 2, (4, 8, 8))
        assert not task.labels("train").any()
        with pytest.raises(HoldfastError, match="no sub-folders"):
            load_task(f"{tmp_path}/faces")

    def test_flat_folders_for_training_and_testing(self, tmp_path):
        self.save(tmp_path / "faces" / "train", 5)
        self.save(tmp_path / "faces" / "test", 3)
        task = load_task(f"{tmp_path}/faces@kind=denoising")
        assert (task.size("train"), task.size("test")) == (5, 3)

    def test_folders_with_classes_may_be_narrowed_to_one(self, tmp_path):
        for name in ("cats", "dogs"):
            self.save(tmp_path / "pets" / name)
        assert load_task(f"{tmp_path}/pets@kind=denoising").size("train") == 12
        one = load_task(f"{tmp_path}/pets[1]@kind=denoising")
        assert (one.size("train"), one.class_names) == (6, ["dogs"])
        with pytest.raises(HoldfastError, match="at least two"):
            load_task(f"{tmp_path}/pets[1]")

    def test_arrays_with_and_without_labels(self, tmp_path):
        x = np.random.default_rng(0).integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
        np.savez(tmp_path / "bare.npz", x_train=x[:20], x_test=x[20:])
        np.savez(tmp_path / "full.npz", x_train=x[:20], x_test=x[20:], y_train=np.arange(20) % 4, y_test=[0] * 10)
        np.savez(tmp_path / "half.npz", x_train=x[:20], x_test=x[20:], y_train=np.arange(20) % 4)
        bare = load_task("bare@kind=denoising", data_dir=tmp_path)
        assert (bare.size("train"), bare.size("test"), bare.class_names) == (20, 10, ["0"])
        assert load_task("full@kind=denoising", data_dir=tmp_path).class_names == ["0", "1", "2", "3"]
        with pytest.raises(HoldfastError, match="lacks y_train, y_test"):
            load_task("bare", data_dir=tmp_path)
        with pytest.raises(HoldfastError, match="lacks y_test"):
            load_task("half@kind=denoising", data_dir=tmp_path)

    def test_sources_without_images_are_refused(self, tmp_path, toy):
        rows = ["a,b,kind"] + [f"{i},{i % 5},{'xy'[i % 2]}" for i in range(40)]
        (tmp_path / "plants.csv").write_text("\n".join(rows))
        with pytest.raises(HoldfastError, match="not images"):
            load_task("plants@kind=denoising,target=kind", data_dir=tmp_path)
        with pytest.raises(HoldfastError, match="not images"):
            DenoisingTask.of(toy)
        vectors = np.zeros((4, 3))
        with pytest.raises(HoldfastError, match="holds vectors"):
            DenoisingTask("mine", vectors, [0] * 4, vectors, [0] * 4)
        np.savez(tmp_path / "vectors.npz", x_train=vectors, x_test=vectors)
        with pytest.raises(HoldfastError, match="holds vectors"):
            load_task("vectors@kind=denoising", data_dir=tmp_path)

    def test_a_schedule_is_for_denoising(self):
        with pytest.raises(HoldfastError, match="schedule is for kind=denoising"):
            load_task("digits@schedule=linear")
        with pytest.raises(HoldfastError, match="did you mean 'sigmoid'"):
            load_task("digits@kind=denoising,schedule=sigmod")

    def test_one_class_without_labels_is_not_classification(self):
        x = np.zeros((4, 4, 4), np.uint8)
        with pytest.raises(HoldfastError, match="one class only"):
            ArrayTask("mine", x, [0] * 4, x, [0] * 4)
        assert noise_task().class_names == ["0"]
