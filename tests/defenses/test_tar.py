from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import reference
from conftest import toy_task
from holdfast.defenses import TAR
from holdfast.defenses.hidden_states import states_of, with_hidden_states
from holdfast.defenses.sophon.simulation import Simulation
from holdfast.defenses.tar import _Immunization, hidden_distance
from holdfast.errors import HoldfastError
from holdfast.losses import negative_entropy
from holdfast.models import SplitModel, load_model
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import load_task
from holdfast.training import Strategy

CPU = torch.device("cpu")
BRIEF = TAR(
    iterations=6, steps=4, evaluate_every=2, batch_size=20, batch_sizes=(20,), guard_every=2, max_benign_drop=1.0
)
STARTS = {"initialisations": ("direct",), "optimizers": ("adam",), "learning_rates": (1e-2,)}


@st.composite
def two_sets_of_states(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rows = draw(st.integers(1, 5))
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    first, second = (
        [scale * torch.randn(rows, width, dtype=torch.float64, generator=generator) for width in widths]
        for _ in range(2)
    )
    return first, second


class TestHiddenDistance:
    @given(two_sets_of_states())
    def test_equals_the_equation(self, states):
        assert hidden_distance(*states).item() == pytest.approx(reference.hidden_distance(*states).item(), rel=1e-9)

    @given(two_sets_of_states(), st.floats(0.1, 10))
    def test_is_symmetric_and_grows_with_the_square(self, states, factor):
        first, second = states
        here = hidden_distance(first, second).item()
        assert here > 0
        assert hidden_distance(second, first).item() == pytest.approx(here)
        farther = hidden_distance([factor * z for z in first], [factor * z for z in second]).item()
        assert farther == pytest.approx(factor**2 * here)
        assert hidden_distance(first, first) == 0

    def test_gradcheck(self):
        torch.manual_seed(0)
        states = [torch.randn(3, d, dtype=torch.float64, requires_grad=True) for d in (2, 4)]
        wanted = [torch.randn(3, d, dtype=torch.float64) for d in (2, 4)]
        assert torch.autograd.gradcheck(lambda a, b: hidden_distance([a, b], wanted), states)


class TestHiddenStates:
    def test_one_pass_returns_what_two_would(self, trained, benign):
        batch = next(benign.sweep("test", 8, device=CPU))
        outputs, states = with_hidden_states(trained, batch.x, 3)
        assert torch.equal(outputs, trained(batch.x))
        assert all(torch.equal(a, b) for a, b in zip(states, trained.features_by_depth(batch.x, 3), strict=True))
        assert not trained._forward_hooks

    def test_all_blocks_unless_told_otherwise(self, model):
        assert [states_of("tar", model, depth) for depth in (None, 1, 3)] == [3, 1, 3]
        with pytest.raises(HoldfastError, match=r"tar: depth is 4.*expected 1 to 3"):
            states_of("tar", model, 4)

    def test_a_head_alone_has_its_inputs_as_states(self):
        model = SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), "1")
        assert states_of("tar", model, None) == 1
        assert with_hidden_states(model, torch.ones(2, 6), 1)[1][0].shape == (2, 6)


class TestTAR:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"iterations": 0}, "tar: iterations is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"depth": 0}, "depth is 0; expected at least 1"),
            ({"learning_rate": 0.0}, "learning_rate is 0"),
            ({"lambda_tr": math.nan}, "lambda_tr is nan; expected a number above 0"),
            ({"lambda_retain": -1.0}, "lambda_retain is -1"),
            ({"representation_weight": math.inf}, "representation_weight is inf"),
            ({"optimizer": "adm"}, "did you mean 'adam'"),
            ({"steps": 6}, "evaluate_every is 4; expected a divisor of the 6 steps"),
            ({"learning_rates": ()}, "tar: learning_rates is empty"),
            ({"scopes": ("lora",)}, "tar: adapters"),
        ],
    )
    def test_bad_settings(self, change, message):
        with pytest.raises(HoldfastError, match=message):
            TAR(**change)

    def test_weights_and_subsampling_are_the_papers(self):
        d = TAR()
        assert (d.lambda_tr, d.lambda_retain, d.evaluate_every) == (4.0, 1.0, 4)
        assert (d.depth, d.disjoint) == (None, True)

    def test_a_step_is_the_optimizers_on_the_equation(self, run):
        """Plain gradient descent moves every weight by the rate times the slow twins' first-order gradient."""
        task, other = toy_task(3, samples=8), toy_task(3, samples=8, seed=1)
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
        model = SplitModel(nn.Sequential(*layers), "4")
        whole = TAR(
            iterations=2, steps=4, evaluate_every=2, optimizer="sgd", learning_rate=0.05, batch_size=10**6,
            batch_sizes=(10**6,), lambda_tr=3.0, lambda_retain=0.5, representation_weight=2.0, max_benign_drop=1.0,
            **STARTS,
        )  # fmt: skip
        moved, record = whole.immunize(model, task, other, run=run)

        kept = task.holdout(whole.holdout, derive_seed(run.seed, "tar", "holdout"))[0]
        learned, unseen = other.halves(derive_seed(run.seed, "tar", "disjoint"))
        kept, learned, unseen = (next(t.sweep("train", 10**6, device=CPU)) for t in (kept, learned, unseen))

        def states(m):
            return [m.network[:2](kept.x), m.network[:4](kept.x)]

        slow, wanted = model.clone(), [z.detach() for z in states(model)]
        for _ in range(2):
            g_tr = reference.adam_simulation(
                slow, lambda m, b: F.cross_entropy(m(b[0]), b[1]), lambda z, _: reference.negative_entropy(z),
                [tuple(learned)] * 4, [tuple(unseen)] * 4, [0, 0.5, 0, 0.5], 1e-2,
            )  # fmt: skip
            retain = F.cross_entropy(slow(kept.x), kept.y) + 2 * reference.hidden_distance(states(slow), wanted)
            gradients = torch.autograd.grad(retain, list(slow.parameters()))
            with torch.no_grad():
                for (name, parameter), g in zip(slow.named_parameters(), gradients, strict=True):
                    parameter.sub_(3 * g_tr[name] + 0.5 * g, alpha=0.05)
        for new, expected in zip(moved.parameters(), slow.parameters(), strict=True):
            assert torch.allclose(new, expected, atol=1e-5)
        distances = record.history["representation_distance"]
        assert distances[0] == 0
        assert distances[1] > 1e-6

    def test_attacks_learn_from_one_half_and_are_judged_on_the_other(self, trained, benign, restricted, run):
        work = _Immunization(BRIEF, trained, benign, restricted, run)
        halves = ({x.numpy().tobytes() for x in t._x["train"]} for t in (work.learned, work.evaluated))
        first, second = halves
        assert first
        assert second
        assert not first & second

    def test_before_the_first_step_no_hidden_state_differs_from_the_originals(self, trained, benign, restricted, run):
        """BatchNorm normalises both by the batch, so only weights can make a difference."""
        distances = BRIEF.immunize(trained, benign, restricted, run=run)[1].history["representation_distance"]
        assert distances[0] == 0
        assert min(distances[1:]) > 0

    def test_attacked_models_become_less_certain_and_benign_samples_are_answered_in_both_modes(
        self, trained, benign, restricted, run
    ):
        """Keeping the benign task in one mode alone would let a network with BatchNorm resist in the other alone."""

        def attacked(model):
            simulation = Simulation(model, negative_entropy)
            strategy = Strategy("direct", "all", "adamw", 3e-3, 50)
            return simulation.run(restricted, strategy, 8, None, generator=torch.Generator().manual_seed(9)).loss

        brief = TAR(
            iterations=35, learning_rate=1e-3, steps=8, initialisations=("direct",), learning_rates=(3e-3,), guard=False
        )
        immunized, _ = brief.immunize(trained, benign, restricted, run=run)
        assert attacked(immunized) < attacked(trained) - 0.1
        assert benign.score(immunized) > 0.75
        batch = next(benign.sweep("test", 200, device=CPU))
        assert benign.score_of(immunized.train()(batch.x), batch) > 0.75

    def test_more_restricted_classes_than_outputs_need_a_fresh_head(self, model, benign, run):
        wide = load_task("digits")
        with pytest.raises(HoldfastError, match=r"tar: it keeps the head, which has 5 outputs.*initialisations"):
            BRIEF.immunize(model, benign, wide, run=run)
        immunized, _ = dataclasses.replace(BRIEF, initialisations=("head",)).immunize(model, benign, wide, run=run)
        assert immunized.num_outputs == 5

    def test_a_frozen_layer_stays(self, trained, benign, restricted, run):
        frozen = trained.clone()
        frozen.network.body[0].requires_grad_(False)
        immunized, _ = BRIEF.immunize(frozen, benign, restricted, run=run)
        assert torch.equal(immunized.network.body[0].weight, trained.network.body[0].weight)
        assert not torch.equal(immunized.head.weight, trained.head.weight)

    def test_a_network_deeper_than_asked_for(self, trained, benign, restricted, run):
        with pytest.raises(HoldfastError, match="tar: depth is 9"):
            dataclasses.replace(BRIEF, depth=9).immunize(trained, benign, restricted, run=run)
        last, _ = dataclasses.replace(BRIEF, depth=1).immunize(trained, benign, restricted, run=run)
        whole, _ = BRIEF.immunize(trained, benign, restricted, run=run)
        assert last.facts().sha256 != whole.facts().sha256

    @pytest.mark.parametrize("more", [{}, {"tasks": 2, "population": 3, "lifetime": 2, "validate_every": 2}])
    def test_stops_and_continues_to_the_same_model(self, trained, benign, restricted, tmp_path, more):
        class Killed(Exception):
            pass

        class Interrupted(Run):
            def seeded(self, *purpose):
                if purpose[:2] == ("tar", 3):
                    raise Killed
                return super().seeded(*purpose)

        brief = dataclasses.replace(BRIEF, validation_steps=2, guard_every=1, **more)
        whole, record = brief.immunize(trained, benign, restricted, run=Run(0, CPU))
        with pytest.raises(Killed):
            brief.immunize(trained, benign, restricted, run=Interrupted(0, CPU, tmp_path))
        resumed, again = brief.immunize(trained, benign, restricted, run=Run(0, CPU, tmp_path))
        assert resumed.facts().sha256 == whole.facts().sha256
        assert again == record
        with pytest.raises(HoldfastError, match="another immunization"):
            dataclasses.replace(brief, lambda_tr=5.0).immunize(trained, benign, restricted, run=Run(0, CPU, tmp_path))

    def test_a_ruined_model_is_not_the_result(self, trained, benign, restricted, run):
        violent = dataclasses.replace(BRIEF, iterations=4, optimizer="sgd", learning_rate=1e3, max_benign_drop=0.05)
        immunized, record = violent.immunize(trained, benign, restricted, run=run)
        assert benign.score(immunized) > benign.score(trained) - 0.06
        assert not record.completed
        assert record.events

    def test_an_exact_meta_gradient_is_another_one(self, run):
        task, other = toy_task(3, samples=8), toy_task(3, samples=8, seed=1)
        model = load_model("mlp", task)
        plain = dataclasses.replace(BRIEF, optimizers=("sgd",), learning_rates=(0.1,))
        first, exact = (
            dataclasses.replace(plain, second_order=second).immunize(model, task, other, run=run)[0]
            for second in (False, True)
        )
        assert first.facts().sha256 != exact.facts().sha256
