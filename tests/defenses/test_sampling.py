"""What a denoiser answers while it draws images is kept, and probes read the noise from its features."""

from __future__ import annotations

import pytest
import torch

from holdfast.defenses import Sophon, TrajectoryErasure
from holdfast.defenses.sophon import sampling
from holdfast.defenses.sophon.sampling import SamplingStates
from holdfast.defenses.sophon.simulation import Simulation
from holdfast.errors import HoldfastError
from holdfast.losses import ridge_probe
from holdfast.metrics.generation import sample
from holdfast.models import ModelSpec, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import Schedule, load_task
from holdfast.tasks.text_to_image import caption_tokens

CPU = torch.device("cpu")
BRIEF = {"iterations": 2, "steps": 2, "batch_sizes": (20,), "reinforcement_batch": 12, "probe_batch": 12,
         "guard": False, "recovery_loops": 0, "optimizers": ("adam",)}  # fmt: skip


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def states(count=6, schedule=None):
    return SamplingStates(schedule or Schedule(), (1, 8, 8), count, device=CPU, generator=stream())


class TestStates:
    def test_they_take_the_steps_of_ddim(self, denoiser):
        """From the noise of `sample`, at its time steps, they end in its images."""
        from diffusers import DDIMScheduler

        taken = states(3)
        scheduler = DDIMScheduler.from_config(denoiser.schedule.config)
        scheduler.set_timesteps(50)
        taken.t = torch.full((3,), int(scheduler.timesteps[0]))
        taken.x = torch.randn(3, 1, 8, 8, generator=stream(4))
        with torch.no_grad():
            for _ in range(49):
                taken.advance(denoiser(taken.inputs()), stream())
            last = int(taken.t[0])
            _, clean = taken.schedule.step_back(taken.x, denoiser(taken.inputs()), taken.t, taken.t)
        assert last == int(scheduler.timesteps[-1])
        drawn = sample(denoiser, 3, seed=4, steps=50)
        assert torch.allclose((clean / 2 + 0.5).clamp(0, 1), drawn, atol=0.02)  # diffusers ends at alpha-bar 1

    def test_a_finished_image_gives_way_to_noise(self):
        running = states()
        running.t[0] = 3
        before = running.x.clone()
        running.advance(torch.zeros_like(running.x), stream(1))
        assert int(running.t[0]) >= 980
        assert (running.t[1:] < 980).all()
        assert not torch.allclose(running.x[0], before[0])

    def test_an_image_that_is_not_finite_gives_way_to_noise(self):
        running = states()
        running.advance(torch.full_like(running.x, torch.nan), stream(1))
        assert running.x.isfinite().all()

    def test_they_are_spread_over_all_time_steps(self):
        running = states(200)
        running.spread(lambda x: torch.zeros_like(x[:, :1]), stream())
        counts = torch.histc(running.t.float(), 5, 0, 1000)
        assert (counts > 15).all()
        assert len({int(t) % running.stride for t in running.t}) == running.stride

    def test_only_those_that_are_named_move(self):
        running = states()
        before, times = running.x.clone(), running.t.clone()
        running.advance(torch.zeros_like(running.x), stream(), torch.tensor([True, False] * 3))
        assert torch.equal(running.x[1::2], before[1::2])
        assert torch.equal(running.t[1::2], times[1::2])
        assert torch.equal(running.t[::2], times[::2] - running.stride)

    def test_a_short_schedule_has_no_step_of_zero(self):
        running = states(schedule=Schedule({"num_train_timesteps": 7}))
        for _ in range(20):
            running.advance(torch.zeros_like(running.x), stream())
        assert ((running.t >= 0) & (running.t < 7)).all()

    def test_without_a_signal_at_the_end_they_begin_before_it(self):
        schedule = Schedule({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
        assert (states(50, schedule).t < schedule.restorable).all()


class TestCaptionedStates:
    """Images that are drawn for captions."""

    @pytest.fixture
    def captioned(self):
        return load_task("digits[0-2]@kind=text-to-image,caption=the digit {},length=8,train_limit=40")

    def made(self, task, count=200):
        return SamplingStates(Schedule(), (1, 8, 8), count, device=CPU, generator=stream(), captioned=task)

    def test_every_image_has_one_of_the_captions(self, captioned):
        running = self.made(captioned)
        assert set(running.labels.tolist()) == {-1, 0, 1, 2}
        assert set(self.made(captioned.with_dropout(0)).labels.tolist()) == {0, 1, 2}
        shown = running.inputs()
        assert torch.equal(caption_tokens(shown[:, -2]), captioned.caption_ids(running.labels))
        assert torch.equal(shown[:, [0, -1]], Schedule().with_steps(running.x, running.t))

    def test_a_caption_stays_until_the_image_is_finished(self, captioned):
        running = self.made(captioned)
        running.t[:100] = 3
        before = running.labels.clone()
        running.advance(torch.zeros_like(running.x), stream(1))
        assert torch.equal(running.labels[100:], before[100:])
        assert not torch.equal(running.labels[:100], before[:100])

    def test_without_captions_nothing_else_is_drawn(self):
        """Denoisers' images are those of before there were captions: noise, then time steps."""
        generator, running = stream(), states(6)
        noise = torch.randn(6, 1, 8, 8, generator=generator)
        late = torch.randint(running.stride, (6,), generator=generator)
        assert torch.equal(running.x, noise)
        assert torch.equal(running.t, 999 - late)
        assert running.labels is None
        assert set(running.saved()) == {"x", "t"}

    def test_they_continue_from_what_was_saved(self, captioned):
        running, again = self.made(captioned, 8), self.made(captioned, 8)
        running.advance(torch.ones_like(running.x), stream(2))
        running.t[:4] = 1
        running.advance(torch.ones_like(running.x), stream(3))
        again.restore({n: v.clone() for n, v in running.saved().items()})
        assert torch.equal(again.inputs(), running.inputs())


@pytest.mark.trains
class TestTextToImage:
    """SOPHON of text-to-image models: what is read from captions, and one noise level as in the released code."""

    def test_the_pixel_probe_reads_what_the_head_sees(self, text_to_image, digit_captions):
        batch = next(digit_captions[0].batches("test", 4, device=CPU))
        with torch.no_grad():
            (rows,) = text_to_image.features_by_depth(batch.x, 1)
            head, outputs = text_to_image.head, digit_captions[0].probe_targets(text_to_image(batch.x))
        assert torch.allclose(rows @ head.weight.flatten(1).T + head.bias, outputs, atol=1e-5)

    def test_deeper_probes_are_refused(self, text_to_image, digit_captions, run):
        with pytest.raises(
            HoldfastError, match=r"the depth of a probe is 2; expected 1 for a denoiser. Set probe_depth"
        ):
            TrajectoryErasure(probe_depth=2).immunize(text_to_image, *digit_captions, run=run)

    def test_at_one_time_step(self, text_to_image, digit_captions):
        narrow = [task.with_timesteps([1]) for task in digit_captions]
        assert Sophon().resolved(narrow[0]).loss == "dos"
        brief = Sophon(
            iterations=3, steps=2, initialisations=("direct",), learning_rates=(1e-5,), batch_sizes=(8,),
            suppression_lr=1e-2, reinforcement_loops=0, guard=False,
        )  # fmt: skip
        _, record = brief.immunize(text_to_image, *narrow, run=Run(0, CPU))
        assert record.completed
        assert record.history["suppression_loss"][-1] < 0.8 * record.history["suppression_loss"][0]
        with pytest.raises(HoldfastError, match="draws no samples"):
            Sophon(sampling=1.0).immunize(text_to_image, *narrow, run=Run(0, CPU))

    def test_the_states_are_of_the_benign_captions(self, text_to_image, digit_captions, monkeypatch):
        monkeypatch.setattr(sampling, "DDIM_STEPS", 4)
        seen = []
        shown = SamplingStates.inputs
        monkeypatch.setattr(SamplingStates, "inputs", lambda self: seen.append(shown(self)) or seen[-1])
        Sophon(**BRIEF, sampling=1.0).immunize(text_to_image, *digit_captions, run=Run(0, CPU))
        known = {tuple(ids) for ids in digit_captions[0].tokens.tolist()}
        assert {tuple(ids) for x in seen for ids in caption_tokens(x[:, -2]).tolist()} <= known
        assert len({tuple(ids) for ids in caption_tokens(seen[0][:, -2]).tolist()}) > 2

    def test_small_images_are_refused(self, text_to_image, digit_captions, run):
        with pytest.raises(HoldfastError, match="small_size is 4, which is for classification"):
            Sophon(small_size=4, small_rounds=1).immunize(text_to_image, *digit_captions, run=run)


class TestSampling:
    def test_the_default_is_for_denoisers_that_draw_images(self, benign, digit_images):
        assert TrajectoryErasure().resolved(digit_images[0]).sampling == 1
        assert TrajectoryErasure().resolved(digit_images[0]).loss == "dos"
        assert TrajectoryErasure().resolved(benign).sampling == 0
        assert TrajectoryErasure().resolved(load_task("digits@kind=denoising,timesteps=1")).sampling == 0
        assert TrajectoryErasure(sampling=3.0).resolved(digit_images[0]).sampling == 3
        assert Sophon().resolved(digit_images[0]).sampling == 0

    def test_a_classifier_draws_nothing(self, model, benign, restricted, run):
        with pytest.raises(HoldfastError, match="draws no samples"):
            Sophon(sampling=1.0).immunize(model, benign, restricted, run=run)

    def test_it_holds_the_outputs_on_the_way(self, denoiser, digit_images, monkeypatch):
        """Against the same reinforcement without it, the outputs stay nearer to the original's."""
        monkeypatch.setattr(sampling, "DDIM_STEPS", 10)
        on_the_way = states(60)
        on_the_way.spread(denoiser, stream(9))
        x = on_the_way.inputs()

        def distance(weight):
            settings = Sophon(**{**BRIEF, "iterations": 3, "suppression_lr": 3e-3, "reinforcement_loops": 3,
                                 "reinforcement_lr": 2e-3}, sampling=weight)  # fmt: skip
            made, _ = settings.immunize(denoiser, *digit_images, run=Run(0, CPU))
            with torch.no_grad():
                return float((made(x) - denoiser(x)).square().mean())

        assert distance(10.0) < 0.7 * distance(0.0)

    def test_at_the_original_it_costs_nothing(self, denoiser, digit_images, run, monkeypatch):
        """The first reinforcement loop alone: the distance and its gradient are zero there."""
        monkeypatch.setattr(sampling, "DDIM_STEPS", 4)
        settings = {**BRIEF, "iterations": 1, "reinforcement_loops": 1, "suppression_lr": 1e-12}
        plain, with_it = (
            Sophon(**settings, sampling=weight).immunize(denoiser, *digit_images, run=run)[1].history
            for weight in (0.0, 5.0)
        )
        assert with_it["reinforcement_loss"] == pytest.approx(plain["reinforcement_loss"], rel=1e-5)


class TestPixelProbe:
    def test_a_row_is_what_the_head_sees(self, denoiser, digit_images):
        batch = next(digit_images[0].batches("test", 4, device=CPU))
        with torch.no_grad():
            (rows,) = denoiser.features_by_depth(batch.x, 1)
            head = denoiser.head
            outputs = digit_images[0].probe_targets(denoiser(batch.x))
        assert torch.allclose(rows @ head.weight.flatten(1).T + head.bias, outputs, atol=1e-5)

    def test_it_explains_at_least_what_the_head_does(self, denoiser, digit_images):
        batch = next(digit_images[0].batches("test", 64, device=CPU))
        with torch.no_grad():
            (rows,) = denoiser.features_by_depth(batch.x, 1)
            targets = digit_images[0].probe_targets(batch.y)
            head = 1 - digit_images[0].loss_of(denoiser(batch.x), batch) / targets.var(correction=0)
            probe = ridge_probe(rows, targets, 1e-8)
        assert float(head) - 1e-6 <= float(probe) <= 1

    @pytest.mark.parametrize("depth", [0, 2])
    def test_it_is_for_the_last_block(self, denoiser, depth):
        with pytest.raises(HoldfastError, match="expected 1 for a denoiser"):
            denoiser.features_by_depth(torch.zeros(1, 2, 8, 8), depth)

    def test_the_network_must_predict_the_noise(self, digit_images):
        schedule = {"prediction_type": "v_prediction"}
        task = load_task("digits@kind=denoising")
        other = load_model(ModelSpec(name="unet", options={"widths": [8], "schedule": schedule}), task)
        assert "predicts v_prediction" in str(other.not_probed(1))
        with pytest.raises(HoldfastError, match="predicts v_prediction"):
            other.features_by_depth(torch.zeros(1, 2, 8, 8), 1)

    def test_suppression_lowers_it(self, denoiser, digit_images):
        """Probes alone, without DoS: less of the restricted noise can be read from the features."""
        settings = Sophon(**{**BRIEF, "iterations": 5, "suppression_lr": 3e-3}, loss="none", probe_weight=1.0)
        made, _ = settings.immunize(denoiser, *digit_images, run=Run(0, CPU))
        batch = next(digit_images[1].batches("test", 100, device=CPU))

        def explained(model):
            with torch.no_grad():
                (rows,) = model.features_by_depth(batch.x, 1)
            return float(ridge_probe(rows, digit_images[1].probe_targets(batch.y)))

        assert explained(made) < explained(denoiser) - 0.02


class TestMaxTimestep:
    def test_adversaries_are_evaluated_up_to_it(self, denoiser, digit_images, monkeypatch):
        evaluated, run = [], Simulation.run
        monkeypatch.setattr(
            Simulation,
            "run",
            lambda self, task, *rest, evaluation=None, **more: (
                evaluated.append((task, evaluation)) or run(self, task, *rest, evaluation=evaluation, **more)
            ),
        )
        advance = Simulation.advance
        monkeypatch.setattr(
            Simulation,
            "advance",
            lambda self, adversary, task, *rest, evaluation=None, **more: (
                evaluated.append((task, evaluation))
                or advance(self, adversary, task, *rest, evaluation=evaluation, **more)
            ),
        )
        Sophon(**BRIEF, max_timestep=300).immunize(denoiser, *digit_images, run=Run(0, CPU))
        learned, scored = evaluated[0]
        assert learned.timesteps == ()
        assert scored.timesteps == tuple(range(301))

    @pytest.mark.parametrize("steps", [-1, 1000])
    def test_there_must_be_such_a_step(self, denoiser, digit_images, run, steps):
        with pytest.raises(HoldfastError, match=rf"max_timestep is {steps}\b"):
            Sophon(max_timestep=steps).immunize(denoiser, *digit_images, run=run)

    def test_a_classifier_has_none(self, model, benign, restricted, run):
        with pytest.raises(HoldfastError, match="does not have all time steps"):
            Sophon(max_timestep=3).immunize(model, benign, restricted, run=run)
        with pytest.raises(HoldfastError, match="has no time steps"):
            benign.with_timesteps([1])

    def test_a_task_at_some_time_steps_has_only_these(self, digit_images):
        narrow = digit_images[0].with_timesteps([3, 5])
        batch = next(narrow.batches("train", 50, generator=stream(), device=CPU))
        assert set(batch.x[:, -1].flatten().tolist()) == {3.0, 5.0}
        assert narrow.sampling_schedule is None
        assert digit_images[0].timesteps == ()
