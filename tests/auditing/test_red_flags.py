from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.auditing.curve_flags import flags_of_curves
from holdfast.auditing.red_flags import OF_FRESH, REMEDIES, compare, flags_of_code, red_flags
from holdfast.defenses.registry import build_defense
from holdfast.experiments.recipe import load as load_recipe
from holdfast.metrics.diagnostics import PARTS, Inspection, inspect, rms
from holdfast.models import ModelSpec, SplitModel, every_tensor, load_model
from holdfast.results import Curve
from holdfast.tasks import ArrayTask, TaskSpec, load_task
from holdfast.tasks.data_checks import HELD, SHARED
from holdfast.tasks.splits import halves
from holdfast.training import pretrain
from zoo import ZOO, make
from zoo.blocked_gradients import Detached, Lie, Rounded
from zoo.settings import zoo_tasks
from zoo.surgery import Foreign, foreign
from zoo.training_mode import InTraining

EXPECTED = {
    "shrunk-convolutions": {"Unusual scales", "Exploding gradients"},
    "grown-convolutions": {"Unusual scales", "Vanishing gradients"},
    "huge-gamma": {"Unusual scales", "Exploding gradients"},
    "rescaled-pairs": {"Unusual scales", "Exploding gradients"},
    "uneven-units": {"Unusual scales"},
    "huge-weight-norm": {"Unusual scales", "Vanishing gradients"},
    "ill-conditioned-insert": {"Linear layers in a row", "Unusual scales"},
    "saturated-logits": {"Vanishing gradients"},
    "saturated-head": {"Saturated logits", "Exploding gradients"},
    "dead-units": {"Dead units"},
    "trigger": {"Dead units"},
    "hidden-in-buffers": {"Hidden weights", "Vanishing gradients"},
    "unregistered-stem": {"Hidden weights"},
    "tripwire": {"Code that cannot be replaced"},
    "frozen": {"No trainable parameters"},
    "restoring": {"State that moves by itself", "Hidden weights", "Gradients that lie"},
    "flipped-gradient": {"Gradients that lie"},
    "random-gradient": {"Gradients that lie"},
    "exploding-gradient": {"Gradients that lie", "Exploding gradients"},
    "detached": {"Gradients that lie", "Vanishing gradients"},
    "quantised": {"Gradients that lie", "Vanishing gradients"},
    "poisoned-statistics": {"Poisoned BatchNorm statistics", "Another model in training mode"},
    "absurd-momentum": {"Poisoned BatchNorm statistics", "Another model in training mode"},
    "huge-in-training": {"Exploding gradients"},
    "noise-in-training": {"Another model in training mode"},
    "shuffled-in-training": {"Another model in training mode"},
    "nan-in-training": {"Another model in training mode", "Exploding gradients"},
    "raises-in-training": {"Failing code"},
    "dropout": {"Another model in training mode"},
    "scrambles-itself": {"State that moves by itself", "Another model in training mode"},
    "noisy": {"Unrepeatable outputs"},
}
"""The critical flags that a sham must raise, whatever else it raises."""


def parts_for(expected):
    """The measurements behind some flags: finite differences, which take most of the time, show one of them alone."""
    return [part for part in PARTS if part != "derivatives" or "Gradients that lie" in expected]


def names(flags, severity=None):
    return {f.name for f in flags if severity in (None, f.severity)}


@pytest.fixture(scope="module")
def zoo():
    benign, restricted = zoo_tasks()
    return benign, *halves(restricted)


def fresh_of(model, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.fresh()


@pytest.fixture(scope="module")
def usual(zoo_originals, zoo, session_run):
    """What originals and fresh models show: measured once for the whole zoo."""
    benign, _, restricted = zoo

    def seen(model, parts=PARTS):
        return inspect(model, benign=benign, restricted=restricted, run=session_run, parts=parts)

    return {norm: (seen(model), seen(fresh_of(model, 5), OF_FRESH)) for norm, model in zoo_originals.items()}


@pytest.fixture
def flags(zoo, usual, run):
    benign, _, restricted = zoo

    def flags_of(model, norm="none", parts=PARTS):
        return compare(inspect(model, benign=benign, restricted=restricted, run=run, parts=parts), *usual[norm])

    return flags_of


class TestShams:
    def test_every_sham_of_these_families_has_its_row(self):
        families = {"scales", "blocked_gradients", "hidden_weights", "training_mode"}
        assert set(EXPECTED) == {name for name, each in ZOO.items() if each.family in families}

    @pytest.mark.parametrize("name", EXPECTED)
    def test_is_caught(self, name, zoo_originals, zoo, flags, run):
        released, norm = make(name), ZOO[name].setting
        found = flags(released, norm, parts_for(EXPECTED[name]))
        found += flags_of_code(released, zoo_originals[norm], benign=zoo[0], run=run)
        # The gradient of saturated logits is near the limit between a warning and a critical flag.
        assert EXPECTED[name] <= names(found, None if name == "saturated-logits" else "critical"), found

    @pytest.mark.parametrize(
        ("between", "behind", "expected"),
        [
            (Detached(), None, {"Vanishing gradients", "Gradients that lie"}),
            (Rounded(0.01), None, {"Vanishing gradients", "Gradients that lie"}),
            (Lie("flipped"), None, {"Gradients that lie"}),
            (InTraining("nan"), None, {"Another model in training mode"}),
            (None, InTraining("shuffle"), {"Another model in training mode"}),
        ],
    )
    def test_a_single_trick_is_enough(self, between, behind, expected, zoo_originals, flags):
        released = foreign(zoo_originals["none"], between, behind)
        assert expected <= names(flags(released, parts=parts_for(expected)), "critical")


class TestHonestModels:
    @pytest.mark.parametrize("norm", ["batch", "none"])
    def test_original_and_fresh(self, norm, zoo_originals, flags, usual):
        assert compare(usual[norm][0], *usual[norm]) == []
        assert flags(fresh_of(zoo_originals[norm], 0), norm) == []
        assert flags(fresh_of(zoo_originals[norm], 1), norm, parts_for(())) == []

    @pytest.mark.parametrize("norm", ["batch", "none"])
    def test_a_wrapper_that_does_nothing(self, norm, zoo_originals, flags):
        assert flags(foreign(zoo_originals[norm]), norm) == []

    @pytest.mark.parametrize(
        ("name", "options", "size"),
        [
            ("mlp", {}, None),
            ("cifar_resnet", {"depth": 8}, 8),
            ("timm:test_resnet", {}, 16),
            ("timm:test_vit", {"img_size": 16, "patch_size": 8}, 16),
        ],
    )
    @pytest.mark.trains
    def test_architectures(self, name, options, size, run):
        spec = {"image_size": size, "channels": 3} if size else {}
        benign, restricted = (load_task(TaskSpec(data=f"digits[{c}]", **spec)) for c in ("0-6", "7-9"))
        with run.seeded("original"):
            raw = load_model(ModelSpec(name=name, options=options), benign)
        original = pretrain(raw, benign, steps=5, run=run)
        fresh, other = fresh_of(original, 1), fresh_of(original, 2)
        seen = {
            m: inspect(m, benign=benign, restricted=restricted, run=run, parts=parts)
            for m, parts in ((original, PARTS), (fresh, OF_FRESH), (other, parts_for(())))
        }
        for released in (original, other):
            found = compare(seen[released], seen[original], seen[fresh])
            found += flags_of_code(released, original, benign=benign, run=run)
            assert names(found, "critical") == set(), found

    @pytest.mark.parametrize("norm", ["batch", "none"])
    def test_an_immunized_model(self, norm, zoo_originals, zoo, flags, run):
        benign, defender, _ = zoo
        sophon = build_defense(load_recipe("quickstart", scale="smoke").defense)
        immunized, _ = sophon.immunize(zoo_originals[norm], benign, defender, run=run)
        assert names(flags(immunized, norm), "critical") == set()

    def test_nothing_is_changed_by_looking(self, zoo_originals, zoo, run, brief_look):
        benign, _, restricted = zoo
        model = zoo_originals["batch"].clone().train()
        model.network.body[0].requires_grad_(False)
        before, random = model.facts().sha256, torch.get_rng_state()
        first, again = (inspect(model, benign=benign, restricted=restricted, run=run) for _ in range(2))
        assert model.facts().sha256 == before
        assert torch.equal(torch.get_rng_state(), random)
        assert model.training
        assert not model.network.body[0].weight.requires_grad
        assert first == again


class TestExtremes:
    def test_a_layer_may_answer_with_integers_or_nothing(self):
        assert rms(torch.tensor([1, 7])) == pytest.approx(5.0)
        assert rms(torch.tensor([True, True])) == 1.0
        assert rms(torch.zeros(0)) == 0.0

    @pytest.mark.parametrize(("accuracy", "turned"), [(0.75, False), (0.85, True)])
    def test_a_negated_head_must_be_better_than_a_guess(self, accuracy, turned):
        """A network that gives one answer is right on a whole class when its head is negated: half of two classes."""
        never = Inspection(negated=0.0)
        found = compare(Inspection(negated=accuracy, guess=0.5), never, never)
        assert ("Answers turned around" in names(found)) is turned

    def test_weights_that_are_not_finite(self, zoo_originals, flags):
        model = zoo_originals["none"].clone()
        with torch.no_grad():
            model.head.weight.fill_(torch.nan)
        assert "Outputs that are not finite" in names(flags(model, parts=parts_for(())), "critical")

    def test_all_weights_zero(self, zoo_originals, flags):
        model = zoo_originals["none"].clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert {"Vanishing gradients", "Dead units"} <= names(flags(model, parts=parts_for(())), "critical")

    def test_no_parameters_at_all(self, zoo_originals, flags):
        model = zoo_originals["none"].clone()
        for layer in [m for m in model.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            for name in ("weight", "bias"):
                value = getattr(layer, name).detach()
                delattr(layer, name)
                layer.register_buffer(name, value)
        assert {"No trainable parameters", "Hidden weights"} <= names(flags(model), "critical")

    def test_a_model_that_cannot_be_copied(self, zoo_originals, flags):
        class Uncopyable(Foreign):
            def __deepcopy__(self, memo):
                raise TypeError("not this one")

        original = zoo_originals["none"]
        model = SplitModel(Uncopyable(original.clone().network), "head")
        (flag,) = flags(model)
        assert flag.name == "Failing code"
        assert "not this one" in flag.found

    def test_a_model_that_always_raises(self, zoo_originals, flags):
        class Broken(nn.Module):
            def forward(self, x):
                raise KeyError("x")

        assert "Failing code" in names(flags(foreign(zoo_originals["none"], Broken())), "critical")

    @pytest.mark.parametrize("samples", [1, 400])
    def test_hardly_any_sample_of_another_class(self, samples, zoo_originals, zoo, run):
        benign, _, restricted = zoo
        batch = next(restricted.sweep("train", restricted.size("train"), device=torch.device("cpu")))
        common, rare = (batch.x[batch.y == c][:, 0].mul(255).round().byte().numpy() for c in (1, 0))
        x, y = np.concatenate([np.resize(common, (samples, 8, 8)), rare[:1]]), np.array([1] * samples + [0])
        one, original = ArrayTask("one", x, y, x, y), zoo_originals["batch"]
        assert red_flags(original, original, fresh_of(original, 1), benign=benign, restricted=one, run=run) == []

    def test_what_the_original_does_too_is_no_flag(self, zoo_originals, zoo, run):
        benign, _, restricted = zoo
        noisy = foreign(zoo_originals["none"], nn.Dropout(0.999))
        fresh = foreign(fresh_of(zoo_originals["none"], 1), nn.Dropout(0.999))
        assert red_flags(noisy, noisy, fresh, benign=benign, restricted=restricted, run=run) == []


def test_tensors_are_found_wherever_they_are():
    layer = nn.Linear(2, 2)
    layer.register_buffer("buffer", torch.zeros(1), persistent=False)
    layer.aside = {"a": [nn.Linear(1, 1, bias=False)], "b": (torch.ones(2),)}
    layer.again = layer.weight
    layer.itself = [layer]
    assert [name for name, _ in every_tensor(layer)] == ["weight", "bias", "buffer", "aside.a.0.weight", "aside.b.0"]


def test_another_architecture_is_said(zoo_originals, zoo, run):
    benign, _, restricted = zoo
    original = zoo_originals["none"]
    wider = load_model(ModelSpec(name="cnn", options={"depth": 3, "norm": "none", "width": 20}), benign)
    found = red_flags(wider, original, fresh_of(original, 1), benign=benign, restricted=restricted, run=run)
    assert [(f.name, f.severity) for f in found] == [("Another architecture", "warning")]


class TestCodeThatCannotBeReplaced:
    def flags(self, released, original, zoo, run):
        found = flags_of_code(released, original, benign=zoo[0], run=run)
        return [f for f in found if f.name == "Code that cannot be replaced"]

    def test_weights_that_do_the_same_in_the_originals_code_raise_no_flag(self, zoo_originals, zoo, run):
        assert self.flags(foreign(zoo_originals["batch"]), zoo_originals["batch"], zoo, run) == []

    def test_another_network_of_published_layers_raises_no_flag(self, zoo_originals, zoo, run):
        wider = load_model(ModelSpec(name="cnn", options={"depth": 3, "norm": "none", "width": 20}), zoo[0])
        assert self.flags(wider, zoo_originals["none"], zoo, run) == []

    def test_weights_that_do_not_fit_there(self, zoo_originals, zoo, run):
        wider = load_model(ModelSpec(name="cnn", options={"depth": 3, "norm": "none", "width": 20}), zoo[0])
        (flag,) = self.flags(foreign(wider), zoo_originals["none"], zoo, run)
        assert (flag.severity, "do not fit the original's code" in flag.found) == ("critical", True)

    def test_the_originals_own_class_with_a_method_replaced(self, zoo_originals, zoo, run):
        original = zoo_originals["none"]
        released = fresh_of(original, 2)
        released.network.forward = original.clone().network.forward
        (flag,) = self.flags(released, original, zoo, run)
        assert "something else than these weights contributes" in flag.found


def test_each_flag_has_a_section_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "red-flags.md").read_text()
    assert re.findall(r"^### (.*)$", page, re.MULTILINE) == [HELD, SHARED, *REMEDIES]


# --- Curves ---


def curve(adversary, role, *scores, seed=0):
    return Curve(
        adversary=adversary,
        role=role,
        seed=seed,
        budgets=[0, 10][: len(scores) + 1],
        scores=[0.1, *scores],
        losses=[None] * (len(scores) + 1),
        folds=[None] * (len(scores) + 1),
        batch_size=10,
    )


def settings(initialisation="direct", undo=(), optimizer="adam", rate=1e-3):
    return {
        "kind": "finetuning", "initialisation": initialisation, "optimizer": optimizer, "learning_rate": rate,
        **({"undo": list(undo)} if undo else {}),
    }  # fmt: skip


class TestCurves:
    def flags(self, immunized, original, adversaries):
        scores = {"immunized": immunized, "original": original}
        curves = [curve(n, role, s) for role, each in scores.items() for n, s in zip(adversaries, each, strict=True)]
        return [(f.name, f.severity) for f in flags_of_curves(curves, adversaries)]

    @pytest.mark.parametrize(
        ("immunized", "original", "expected"),
        [
            ((0.2, 0.8), (0.8, 0.8), [("Resistance that can be undone", "critical")]),
            ((0.2, 0.5), (0.8, 0.8), [("Resistance that can be undone", "warning")]),
            ((0.2, 0.25), (0.8, 0.8), []),
            ((0.2, 0.8), (0.2, 0.8), []),  # the move helps with the original just as much
            ((0.2, 0.8), (0.8, 0.2), [("Resistance that can be undone", "critical")]),
            ((0.8, 0.2), (0.8, 0.8), []),
            ((None, 0.8), (0.8, 0.8), [("Resistance that can be undone", "critical")]),
        ],
    )
    def test_undone(self, immunized, original, expected):
        assert self.flags(immunized, original, {"plain": settings(), "undo": settings(undo=["rescale"])}) == expected

    @pytest.mark.parametrize("start", ["head", "last-block", "last-half"])
    def test_head(self, start):
        adversaries = {"plain": settings(), "new": settings(start)}
        assert self.flags((0.2, 0.7), (0.8, 0.8), adversaries) == [("Resistance of the head alone", "warning")]
        assert self.flags((0.2, 0.7), (0.2, 0.8), adversaries) == []

    def test_a_mean_over_seeds(self):
        adversaries = {"plain": settings(), "undo": settings(undo=["rescale"])}
        scores = {("plain", "immunized"): (0.2, 0.8), ("undo", "immunized"): (0.8, 0.2)}
        curves = [curve(n, r, s, seed=i) for (n, r), each in scores.items() for i, s in enumerate(each)]
        curves += [curve(n, "original", 0.8) for n in adversaries]
        assert flags_of_curves(curves, adversaries) == []

    @pytest.mark.parametrize(
        ("immunized", "expected"),
        [((0.1, 0.1, 0.1, 0.7), True), ((0.1, 0.1, 0.1, 0.1), True), ((0.1, 0.6, 0.6, 0.6), False)],
    )
    def test_collapse(self, immunized, expected):
        adversaries = {f"a{r}": settings(rate=r) for r in (1e-4, 1e-3, 1e-2, 1e-1)}
        scores = {"immunized": immunized, "original": (0.7, 0.8, 0.8, 0.8), "scratch": (0.1, 0.7, 0.7, 0.6)}
        curves = [curve(n, role, s) for role, each in scores.items() for n, s in zip(adversaries, each, strict=True)]
        found = flags_of_curves(curves, adversaries)
        assert [f.name for f in found] == (["Collapsed learning rates"] if expected else [])
        for flag in found:
            (other,) = flags_of_curves(curves, adversaries, from_control="from the reference tiny")
            assert other.found == flag.found.replace("from scratch", "from the reference tiny") != flag.found

    @pytest.mark.parametrize(
        ("immunized", "original", "expected"),
        [
            ([(0.25, 0.25), (0.25, 0.25)], [(0.8, 0.9), (0.8, 0.9)], ["critical"]),
            (
                [(0.25, 0.5), (0.25, 0.25)],
                [(0.8, 0.9), (0.8, 0.9)],
                ["critical"],
            ),  # of two classes
            ([(0.25, 0.25), (0.3, 0.4)], [(0.8, 0.9), (0.8, 0.9)], ["warning"]),
            ([(0.25, 0.26), (0.3, 0.4)], [(0.8, 0.9), (0.8, 0.9)], []),
            (
                [(0.25, 0.25), (0.3, 0.4)],
                [(0.25, 0.25), (0.8, 0.9)],
                [],
            ),  # too low a rate
        ],
    )
    def test_constant_answers(self, immunized, original, expected):
        adversaries = {"a": settings(rate=1e-3), "b": settings(rate=1e-2)}
        curves = [
            curve(n, role, score, seed=seed)
            for role, scores in (("immunized", immunized), ("original", original))
            for n, pair in zip(adversaries, scores, strict=True)
            for seed, score in enumerate((*pair, pair[0]))
        ]
        found = flags_of_curves(curves, adversaries, [0.25, 0.5, 0.25])
        assert [f.severity for f in found if f.name == "Constant answers"] == expected
        assert not [f for f in flags_of_curves(curves, adversaries) if f.name == "Constant answers"]

    def test_nothing_to_compare(self):
        assert flags_of_curves([], {}) == []
        worse = [curve("a", role, -4.0) for role in ("immunized", "original", "scratch")]
        assert (
            flags_of_curves(
                [*worse, curve("b", "immunized", -0.1), curve("b", "original", -4.0)],
                {"a": settings(), "b": settings(undo=["rescale"])},
            )
            == []
        )  # all of it is useless
        assert flags_of_curves([curve("p", "immunized", 0.9)], {"p": {"kind": "probe"}}) == []
        stopped = [curve("a", r) for r in ("immunized", "original", "scratch")]  # given up before the first budget
        assert flags_of_curves(stopped, {"a": settings()}) == []
