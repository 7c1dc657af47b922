from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import reference
from cases import DEFENSES, DENOISING, DETERMINISTIC, TEXT_TO_IMAGE
from conftest import toy_task
from holdfast.defenses import DEFENSES as REGISTRY
from holdfast.defenses import Sophon
from holdfast.defenses.sophon import sampling
from holdfast.defenses.sophon.simulation import Simulation
from holdfast.errors import HoldfastError
from holdfast.losses import LOSSES, inverse_cross_entropy
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.runtime.run import Run
from holdfast.tasks import load_task
from holdfast.training import Strategy

CPU = torch.device("cpu")


def test_every_defense_has_a_case():
    assert {type(d) for d in (*DEFENSES.values(), *TEXT_TO_IMAGE.values())} == set(REGISTRY.values())


@pytest.fixture(scope="module")
def made(benign, restricted):
    """By a defense's name: its immunized model and record, with the seed 0 and without a folder; shared."""
    found = {}

    def immunized(name):
        if name not in found:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                original = load_model("cnn", benign)
            digest = original.facts().sha256
            found[name] = DEFENSES[name].immunize(original, benign, restricted, run=Run(0, CPU))
            assert original.facts().sha256 == digest
        return found[name]

    return immunized


@pytest.mark.parametrize("name", DEFENSES)
class TestEveryDefense:
    def test_returns_a_new_model_and_leaves_the_old_one(self, name, made, model):
        immunized, record = made(name)
        assert model.facts().sha256 != immunized.facts().sha256
        assert all(p.isfinite().all() for p in immunized.parameters())
        assert not immunized.training
        assert DEFENSES[name].result(record).config == DEFENSES[name].config()

    def test_the_seed_decides_and_not_torchs_global_generator(self, name, made, model, benign, restricted, tmp_path):
        """Nor a folder, from which a second call gets the same model."""
        first = made(name)[0].facts().sha256
        torch.manual_seed(3)
        state = torch.get_rng_state()
        again, record = DEFENSES[name].immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))
        assert torch.equal(torch.get_rng_state(), state)
        assert again.facts().sha256 == first
        second, read = DEFENSES[name].immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))
        assert second.facts().sha256 == first
        assert read == record
        other, _ = DEFENSES[name].immunize(model, benign, restricted, run=Run(1, CPU))
        assert (other.facts().sha256 == first) is (name in DETERMINISTIC)

    def test_refuses_a_model_that_does_not_fit(self, name, model, restricted, run):
        with pytest.raises(HoldfastError, match="5 outputs and its task"):
            DEFENSES[name].immunize(model, load_task("digits"), restricted, run=run)


class Killed(Exception):
    pass


class Interrupted(Run):
    """Is killed after two rounds."""

    rounds = 2

    def seeded(self, *purpose):
        if purpose[:2] in [(name, self.rounds) for name in ("sophon", "trajectory-erasure", "imma-diffusion")]:
            raise Killed
        return super().seeded(*purpose)


class TestSophonResumes:
    @pytest.mark.parametrize("name", [n for n, d in DEFENSES.items() if isinstance(d, Sophon)])
    def test_stops_and_continues_to_the_same_model(self, name, made, model, benign, restricted, tmp_path):
        whole, record = made(name)
        with pytest.raises(Killed):
            DEFENSES[name].immunize(model, benign, restricted, run=Interrupted(0, CPU, tmp_path))
        resumed, again = DEFENSES[name].immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))
        assert resumed.facts().sha256 == whole.facts().sha256
        assert again.history == record.history
        with pytest.raises(HoldfastError, match="another immunization"):  # of another seed
            DEFENSES[name].immunize(model, benign, restricted, run=Run(1, CPU, tmp_path))

    @pytest.mark.parametrize("name", ["sophon-many", "sophon-wide", "sophon-exact", "sophon-lasting"])
    def test_stops_and_continues_where_class_counts_differ(self, name, model, benign, tmp_path):
        """What a simulation left behind must not decide what the next one draws, whatever holds the adversaries."""
        narrow, settings = (
            load_task("digits[5-7]"),
            dataclasses.replace(DEFENSES[name], initialisations=("head",), head_gradient=False),
        )
        whole, _ = settings.immunize(model, benign, narrow, run=Run(0, CPU))
        with pytest.raises(Killed):
            settings.immunize(model, benign, narrow, run=Interrupted(0, CPU, tmp_path))
        resumed, _ = settings.immunize(model, benign, narrow, run=Run(0, CPU, tmp_path))
        assert resumed.facts().sha256 == whole.facts().sha256


class Stopped(Interrupted):
    """Is killed after one."""

    rounds = 1


@pytest.fixture(scope="module")
def noised():
    """A narrow denoiser with attention in its middle alone, and few images."""
    tasks = [load_task(f"digits{part}@kind=denoising,train_limit=100,test_limit=30") for part in ("[0-4]", "[5-9]")]
    return _fresh(ModelSpec(name="unet", options={"widths": [8], "attention": 1}), tasks[0]), *tasks


@pytest.fixture(scope="module")
def captioned():
    """A narrow text-to-image model that reads captions in its middle alone, and few images."""
    task = load_task("digits@kind=text-to-image,caption=a photo of the digit {},train_limit=100,test_limit=40")
    spec = ModelSpec(name="text-unet", options={"widths": [8], "attention": 1})
    return _fresh(spec, task), task.subset(range(8)), task.subset([8, 9])


def _fresh(spec, task):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_model(spec, task).eval()


GENERATION = [("noised", DENOISING, n) for n in DENOISING] + [("captioned", TEXT_TO_IMAGE, n) for n in TEXT_TO_IMAGE]


@pytest.mark.parametrize(("kind", "table", "name"), GENERATION, ids=[f"{kind}-{name}" for kind, _, name in GENERATION])
def test_of_generation(kind, table, name, request, tmp_path, monkeypatch):
    """It leaves the original alone, depends on the seed, and stops and continues to the same model.

    Settings of one defense draw in the same way, so each defense has one case with another seed.
    """
    monkeypatch.setattr(sampling, "DDIM_STEPS", 3)  # an image is drawn in fewer steps
    original, *tasks = request.getfixturevalue(kind)
    digest, random = original.facts().sha256, name not in DETERMINISTIC
    first = next(n for n in table if type(table[n]) is type(table[name])) == name
    whole, record = table[name].immunize(original, *tasks, run=Run(0, CPU))
    assert original.facts().sha256 == digest != whole.facts().sha256
    assert all(p.isfinite().all() for p in whole.parameters())
    assert not whole.training
    assert set(whole.network.state_dict()) == set(original.network.state_dict())
    if random:
        with pytest.raises(Killed):
            table[name].immunize(original, *tasks, run=Stopped(0, CPU, tmp_path))
    resumed, again = table[name].immunize(original, *tasks, run=Run(0, CPU, tmp_path))
    assert resumed.facts().sha256 == whole.facts().sha256
    assert again.history == record.history
    if not random:
        other, _ = table[name].immunize(original, *tasks, run=Run(1, CPU))
        assert other.facts().sha256 == whole.facts().sha256
    elif first:
        _, other = dataclasses.replace(table[name], iterations=1).immunize(original, *tasks, run=Run(1, CPU))
        losses = [s for s in other.history if s.endswith("_loss") and record.history[s][0] is not None]
        assert losses
        assert all(other.history[series][0] != record.history[series][0] for series in losses)


@pytest.mark.parametrize("name", [n for n, d in REGISTRY.items() if not issubclass(d, Sophon)])
def test_what_is_not_for_denoisers_refuses_one(name, denoiser, digit_images, run):
    reasons = "denoising task .* For denoisers there are|is for classification|is for text-to-image models"
    with pytest.raises(HoldfastError, match=reasons):
        REGISTRY[name]().immunize(denoiser, *digit_images, run=run)


OF_CAPTIONS = {type(defense) for defense in TEXT_TO_IMAGE.values()}


@pytest.mark.parametrize("name", [n for n, d in REGISTRY.items() if d not in OF_CAPTIONS])
def test_what_is_for_classification_refuses_a_text_to_image_model(name, text_to_image, digit_captions, run):
    reasons = "text-to-image task .* for text-to-image models also imma-diffusion|is for classification"
    with pytest.raises(HoldfastError, match=reasons):
        REGISTRY[name]().immunize(text_to_image, *digit_captions, run=run)


@pytest.mark.parametrize("name", [n for n, d in REGISTRY.items() if d in OF_CAPTIONS and not issubclass(d, Sophon)])
def test_what_is_for_text_to_image_models_refuses_a_classifier(name, model, benign, restricted, digit_captions, run):
    with pytest.raises(HoldfastError, match=f"{name} is for text-to-image models.*got the classification task"):
        REGISTRY[name]().immunize(model, benign, restricted, run=run)
    with pytest.raises(HoldfastError, match="needs one noise of a captioned image"):
        REGISTRY[name]().immunize(model, *digit_captions, run=run)


def double(task):
    task._x = {s: v.double() for s, v in task._x.items()}
    return task


class TestMetaGradient:
    @pytest.fixture
    def setting(self):
        torch.manual_seed(0)
        task = double(toy_task(3))
        model = SplitModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), "2")
        return task, model

    def test_equals_the_sum_of_step_gradients(self, setting):
        task, model = setting
        gamma, strategy = (0.5, 1.0, 2.0, 0.25), Strategy("direct", "all", "adam", 1e-2, 10)
        simulation = Simulation(model, inverse_cross_entropy)
        simulation.run(task, strategy, 4, gamma, generator=torch.Generator().manual_seed(5))

        generator = torch.Generator().manual_seed(5)
        stream_r, stream_t = (task.batches("train", 10, generator=generator, device=CPU) for _ in range(2))
        pairs = [(next(stream_r), next(stream_t)) for _ in range(4)]
        expected = reference.adam_simulation(
            model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), reference.ice,
            [tuple(r) for r, _ in pairs], [tuple(t) for _, t in pairs], list(gamma), 1e-2,
        )  # fmt: skip
        for (name, _), mine in zip(model.named_parameters(), simulation.gradient, strict=True):
            assert torch.allclose(mine, expected[name], rtol=1e-8, atol=1e-12), name

    def test_a_denoisers_equals_the_sum_as_well(self, denoiser, digit_images):
        """With the suppression loss of Eq. 16, through GroupNorm and attention."""
        task, model = digit_images[1], denoiser.clone().double()
        gamma, strategy = (0.5, 1.0, 2.0), Strategy("direct", "all", "adam", 1e-3, 10)
        simulation = Simulation(model, LOSSES["dos"])
        simulation.run(task, strategy, 3, gamma, generator=torch.Generator().manual_seed(5))

        generator = torch.Generator().manual_seed(5)
        stream_r, stream_t = (task.batches("train", 10, generator=generator, device=CPU) for _ in range(2))
        pairs = [(next(stream_r), next(stream_t)) for _ in range(3)]
        expected = reference.adam_simulation(
            model, lambda m, b: reference.squared_error(m(b[0]), b[1]), lambda outputs, _: reference.dos(outputs),
            [tuple(r) for r, _ in pairs], [tuple(t) for _, t in pairs], list(gamma), 1e-3,
        )  # fmt: skip
        for (name, _), mine in zip(model.named_parameters(), simulation.gradient, strict=True):
            assert torch.allclose(mine, expected[name], rtol=1e-6, atol=1e-9), name

    def test_simulations_add_up(self, setting):
        task, model = setting

        def gradient(seeds):
            simulation = Simulation(model, inverse_cross_entropy)
            for seed in seeds:
                simulation.run(task, Strategy(), 2, None, generator=torch.Generator().manual_seed(seed))
            return simulation.gradient

        for total, first, second in zip(gradient([1, 2]), gradient([1]), gradient([2]), strict=True):
            assert torch.allclose(total, first + second, rtol=1e-10)

    def test_a_fresh_head_does_not_move_the_released_one(self, setting):
        task, model = setting
        simulation = Simulation(model, inverse_cross_entropy)
        simulation.run(task, Strategy("head"), 3, None, generator=torch.Generator().manual_seed(0))
        moved = {
            n: bool(g.abs().sum() > 0) for (n, _), g in zip(model.named_parameters(), simulation.gradient, strict=True)
        }
        assert moved == {n: not n.startswith("network.2.") for n in moved}

    def test_a_parameter_that_no_simulation_reached_has_no_gradient(self, setting):
        """A gradient of zeros would not do: Adam would move the parameter by its moments."""
        task, model = setting
        simulation = Simulation(model, inverse_cross_entropy)

        def reached(*starts):
            simulation.zero()
            for start in starts:
                simulation.run(task, Strategy(start), 2, None, generator=torch.Generator().manual_seed(0))
            return [g is not None for g in simulation.gradients()]

        assert reached("direct") == [True] * 4
        assert reached("head") == [True, True, False, False]
        assert reached("head", "direct") == [True] * 4
        assert reached() == [False] * 4

    def test_frozen_parameters_of_the_model_get_no_gradient(self, setting):
        task, model = setting
        model.network[0].bias.requires_grad_(False)
        simulation = Simulation(model, inverse_cross_entropy)
        simulation.run(task, Strategy(), 3, None, generator=torch.Generator().manual_seed(0))
        assert [bool(g.abs().sum() > 0) for g in simulation.gradient] == [True, False, True, True]

    @pytest.mark.parametrize("start", ["direct", "head"])
    def test_the_model_and_its_statistics_are_not_touched(self, model, restricted, start):
        digest = model.facts().sha256
        simulation = Simulation(model, inverse_cross_entropy)
        for _ in range(2):
            simulation.run(
                restricted,
                Strategy(start, batch_size=20),
                3,
                None,
                generator=torch.Generator().manual_seed(0),
            )
        assert model.facts().sha256 == digest
        assert all(p.grad is None for p in model.parameters())

    def test_every_simulation_begins_at_the_model(self, model, restricted):
        """Nothing of an earlier adversary is left: neither weights nor BatchNorm statistics nor a head of "
        "another width."""
        narrow = load_task("digits[5-7]")

        def gradient(before):
            simulation = Simulation(model, inverse_cross_entropy)
            for task, strategy in before:
                with torch.random.fork_rng():
                    simulation.run(task, strategy, 3, None, generator=torch.Generator().manual_seed(1))
            simulation.zero()
            simulation.run(restricted, Strategy(batch_size=20), 2, None, generator=torch.Generator().manual_seed(0))
            return simulation.gradient

        other = gradient([(restricted, Strategy(learning_rate=0.1)), (narrow, Strategy("head"))])
        assert all(torch.equal(a, b) for a, b in zip(gradient([]), other, strict=True))

    @pytest.mark.parametrize("loss", ["ice", "klu"])
    def test_following_it_makes_simulated_adversaries_worse(self, model, benign, restricted, run, loss):
        def simulated(which):
            simulation = Simulation(which, LOSSES[loss])
            torch.manual_seed(0)
            return simulation.run(
                restricted,
                Strategy("direct", batch_size=50),
                5,
                None,
                generator=torch.Generator().manual_seed(9),
            )

        brief = Sophon(
            loss=loss, iterations=20, steps=5, learning_rates=(1e-3,), batch_sizes=(50,), suppression_lr=1e-3
        )
        immunized, _ = brief.immunize(model, benign, restricted, run=run)
        assert simulated(immunized) < simulated(model)


class TestSophon:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"loss": "icee"}, "did you mean 'ice'"),
            ({"steps": 0}, "steps is 0"),
            ({"suppression_lr": -1.0}, "suppression_lr is -1"),
            ({"gamma": (1.0,)}, "gamma has 1 weights and there are 50 steps"),
            ({"optimizers": ("sdg",)}, "Unknown optimizer 'sdg'"),
            ({"batch_sizes": ()}, "batch_sizes is empty"),
            ({"learning_rates": (0.0,)}, "above 0"),
            ({"holdout": 1.5}, "holdout is 1.5"),
            ({"suppression_lr": math.nan}, "suppression_lr is nan"),
            ({"clip": 0.0}, "clip is 0"),
            ({"max_benign_drop": -0.1}, "max_benign_drop is -0.1"),
            ({"steps": 1, "gamma": (math.inf,)}, "finite"),
        ],
    )
    def test_bad_settings(self, change, message):
        with pytest.raises(HoldfastError, match=message):
            Sophon(**change)

    def test_defaults_are_the_papers(self):
        """Section 5.1.1."""
        s = Sophon()
        assert (s.suppression_lr, s.reinforcement_lr, s.iterations, s.steps) == (3e-4, 5e-4, 800, 50)
        assert (s.suppression_loops, s.reinforcement_loops, s.optimizers) == (1, 1, ("adam",))
        assert s.learning_rates == (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
        assert s.batch_sizes == (50, 100, 150, 200, 250)
        assert len(s.phi()) == 2 * 5 * 5

    @pytest.mark.parametrize(("clip", "largest"), [(1e-3, 1e-3), (None, None)])
    def test_the_meta_gradient_is_clipped(self, model, benign, restricted, run, clip, largest):
        """Simulated adversaries use SGD and nothing is reinforced: every step of Adam is one of suppression."""
        norms = []

        def look(optimizer, *_):
            if isinstance(optimizer, torch.optim.Adam):
                grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
                norms.append(float(torch.cat(grads).norm()))

        brief = Sophon(iterations=3, suppression_loops=2, reinforcement_loops=0, steps=2, optimizers=("sgd",),
                       initialisations=("direct",), clip=clip)  # fmt: skip
        watch = register_optimizer_step_pre_hook(look)
        try:
            brief.immunize(model, benign, restricted, run=run)
        finally:
            watch.remove()
        assert len(norms) == 3 * 2  # rounds x suppression_loops
        if largest is None:
            assert min(norms) > 0.1
        else:
            assert norms == pytest.approx([largest] * 6, rel=1e-3)

    def test_every_loop_simulates_so_many_adversaries(self, model, benign, restricted, run, monkeypatch):
        simulate, sizes = Simulation.advance, []

        def counted(self, *arguments, **more):
            sizes.append(sum(float(g.abs().sum()) for g in self.gradient))
            return simulate(self, *arguments, **more)

        monkeypatch.setattr(Simulation, "advance", counted)
        Sophon(iterations=2, suppression_loops=2, tasks=3, steps=1).immunize(model, benign, restricted, run=run)
        assert len(sizes) == 2 * 2 * 3
        assert [s == 0 for s in sizes] == [True, False, False] * 4  # they add up, and each loop begins anew

    def test_the_halved_rate_survives_a_resume(self, trained, benign, restricted, tmp_path):
        """Stopped after the guard went back; to continue at the old rate would end in another model."""
        violent = Sophon(iterations=6, steps=2, suppression_lr=0.3, reinforcement_lr=1e-5, guard_every=1,
                         batch_sizes=(20,), clip=None)  # fmt: skip

        class Stopped(Exception):
            pass

        class Interrupted(Run):
            def seeded(self, *purpose):
                if purpose[:2] == ("sophon", 3):
                    raise Stopped
                return super().seeded(*purpose)

        whole, record = violent.immunize(trained, benign, restricted, run=Run(0, CPU))
        assert [e.iteration for e in record.events][:1] < [3]
        with pytest.raises(Stopped):
            violent.immunize(trained, benign, restricted, run=Interrupted(0, CPU, tmp_path))
        resumed, again = violent.immunize(trained, benign, restricted, run=Run(0, CPU, tmp_path))
        assert again == record
        assert resumed.facts().sha256 == whole.facts().sha256

    def test_the_guard_goes_back_and_says_so(self, trained, benign, restricted, run):
        violent = Sophon(
            iterations=6,
            steps=2,
            suppression_lr=0.3,
            reinforcement_lr=1e-5,
            guard_every=1,
            batch_sizes=(20,),
            clip=None,
        )
        immunized, record = violent.immunize(trained, benign, restricted, run=run)
        assert any("suppression_lr halved to 0.15" in e.message for e in record.events)
        assert benign.score(immunized) > benign.score(trained) - 0.1

    def test_the_guard_gives_up_with_the_last_good_state(self, model, benign, restricted, run, monkeypatch):
        monkeypatch.setitem(LOSSES, "ice", lambda z, y: inverse_cross_entropy(z, y) * math.nan)
        immunized, record = Sophon(iterations=50, steps=1, max_rollbacks=3).immunize(model, benign, restricted, run=run)
        assert not record.completed
        assert "gave up after 3 times" in record.events[-1].message
        assert immunized.facts().sha256 == model.facts().sha256

    def test_without_the_guard_a_non_finite_value_ends_it(self, model, benign, restricted, run, monkeypatch):
        monkeypatch.setitem(LOSSES, "ice", lambda z, y: inverse_cross_entropy(z, y) * math.nan)
        _, record = Sophon(iterations=50, steps=1, guard=False).immunize(model, benign, restricted, run=run)
        assert not record.completed
        assert record.history["iteration"] == [1]
        assert record.history["suppression_loss"] == [None]

    def test_a_fresh_head_after_direct_loops_leaves_the_released_head(
        self, model, benign, restricted, run, monkeypatch
    ):
        begin = Simulation.start

        def after(*starts):
            """The model after suppression loops that start so, with nothing else that could move it."""
            left = list(starts)

            def chosen(self, strategy, task):
                return begin(self, dataclasses.replace(strategy, initialisation=left.pop(0)), task)

            monkeypatch.setattr(Simulation, "start", chosen)
            brief = Sophon(iterations=len(starts), steps=2, reinforcement_loops=0, learning_rates=(1e-3,))
            return brief.immunize(model, benign, restricted, run=run)[0]

        first, later = after("direct"), after("direct", "head", "head")
        assert not torch.equal(first.head.weight, model.head.weight)
        assert torch.equal(later.head.weight, first.head.weight)
        assert not torch.equal(later.network.body[0].weight, first.network.body[0].weight)

    def test_frozen_statistics_do_not_move(self, model, benign, restricted, run):
        frozen, free = (m for m in model.network.body if isinstance(m, nn.BatchNorm2d))
        frozen.requires_grad_(False)
        immunized, _ = Sophon(iterations=2, steps=1).immunize(model, benign, restricted, run=run)
        after = [m for m in immunized.network.body if isinstance(m, nn.BatchNorm2d)]
        assert torch.equal(after[0].running_mean, frozen.running_mean)
        assert not torch.equal(after[1].running_mean, free.running_mean)

    def test_more_restricted_classes_than_outputs_needs_a_fresh_head(self, model, benign, run):
        wide = load_task("digits")
        with pytest.raises(HoldfastError, match="initialisations"):
            Sophon(iterations=1, steps=1).immunize(model, benign, wide, run=run)
        Sophon(iterations=1, steps=1, initialisations=("head",)).immunize(model, benign, wide, run=run)
