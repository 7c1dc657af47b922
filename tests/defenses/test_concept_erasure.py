"""Concept erasure: what its closed form promises, and what it does to a text-to-image model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from holdfast.defenses import ConceptErasure, build_defense
from holdfast.defenses.concept_erasure import edit_matrix
from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, load_model
from holdfast.tasks import load_task

CPU = torch.device("cpu")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed=0, width=6, erased=2, preserved=3):
    """A layer's weight, and the vectors c_i, c*_i and c_j."""
    return (
        draw(seed, 4, width),
        draw(seed + 1, erased, width),
        draw(seed + 2, erased, width),
        draw(seed + 3, preserved, width),
    )


SHAPES = {
    "seed": st.integers(0, 10**6), "width": st.integers(1, 9), "erased": st.integers(1, 6),
    "preserved": st.integers(0, 9), "share": st.floats(0, 10), "ridge": st.floats(1e-3, 10),
}  # fmt: skip


class TestClosedForm:
    @settings(max_examples=25)
    @given(**SHAPES)
    def test_the_normal_equations_hold(self, seed, width, erased, preserved, share, ridge):
        weight, c, wanted, kept = problem(seed, width, erased, preserved)
        edited = weight @ edit_matrix(c, wanted, kept, preserve_weight=share, ridge=ridge)
        slope = (edited @ c.T - weight @ wanted.T) @ c
        slope += share * (edited - weight) @ kept.T @ kept + ridge * (edited - weight)
        assert slope.abs().max() < 1e-8 * (1 + edited.abs().max()) * (
            1 + c.square().sum() + share * kept.square().sum()
        )

    @settings(max_examples=25)
    @given(**SHAPES)
    def test_equals_the_sums_of_the_paper(self, seed, width, erased, preserved, share, ridge):
        weight, c, wanted, kept = problem(seed, width, erased, preserved)
        fast = weight @ edit_matrix(c, wanted, kept, preserve_weight=share, ridge=ridge)
        assert torch.allclose(
            fast, reference.edited_weight(weight, c, wanted, kept, share, ridge), rtol=1e-6, atol=1e-6
        )

    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_minimum(self, seed):
        weight, *vectors = problem(10 * seed)
        edited = weight @ edit_matrix(*vectors, preserve_weight=0.7, ridge=0.3)
        least = reference.editing_objective(edited, weight, *vectors, 0.7, 0.3)
        for other in range(20):
            near = edited + 1e-3 * draw(other, *edited.shape)
            assert reference.editing_objective(near, weight, *vectors, 0.7, 0.3) > least

    def test_without_a_ridge_erased_vectors_become_their_targets_and_preserved_ones_stay(self):
        weight, c, wanted, kept = problem()  # five vectors of six numbers: all can be had at once
        edited = weight @ edit_matrix(c, wanted, kept, preserve_weight=1.0, ridge=1e-10)
        assert torch.allclose(c @ edited.T, wanted @ weight.T, atol=1e-6)
        assert torch.allclose(kept @ edited.T, kept @ weight.T, atol=1e-6)

    def test_a_large_weight_keeps_preserved_vectors_that_are_in_the_way(self):
        weight, c, wanted, kept = problem(preserved=6)  # they span the space
        apart = {}
        for share in (1.0, 1e6):
            edited = weight @ edit_matrix(c, wanted, kept, preserve_weight=share, ridge=1e-6)
            apart[share] = float((kept @ (edited - weight).T).norm() / (kept @ weight.T).norm())
        assert apart[1e6] < 1e-4 < apart[1.0]

    def test_a_large_ridge_changes_nothing(self):
        assert torch.allclose(
            edit_matrix(*problem()[1:], preserve_weight=1.0, ridge=1e9), torch.eye(6).double(), atol=1e-6
        )


class TestInAModel:
    def test_a_restricted_caption_means_what_the_target_does(self, text_to_image, digit_captions, run):
        """The edited model answers an erased caption as the original answers the target; benign captions stay."""
        benign, restricted = digit_captions
        exact = ConceptErasure(target=benign.captions[3], ridge=1e-6)
        edited, record = exact.immunize(text_to_image, benign, restricted, run=run)
        noised = next(iter(benign.sweep("test", 8, device=CPU))).x[:, [0, -1]]

        def answers(model, task, label):
            with torch.no_grad():
                return model(task.inputs(noised, torch.full((8,), label)))

        for label in range(2):
            before = answers(text_to_image, restricted, label)
            assert torch.allclose(answers(edited, restricted, label), answers(text_to_image, benign, 3), atol=1e-3)
            assert not torch.allclose(before, answers(text_to_image, benign, 3), atol=1e-3)
        for label in (-1, 0, 3, 7):
            assert torch.allclose(answers(edited, benign, label), answers(text_to_image, benign, label), atol=1e-3)
        assert record.history["erased_tokens"] == [2]
        assert record.history["left"][0] < 1e-3
        assert record.history["preserved_change"][0] < 1e-3

    def test_only_keys_and_values_change(self, text_to_image, digit_captions, run):
        edited, _ = ConceptErasure().immunize(text_to_image, *digit_captions, run=run)
        expected = {f"{name}.weight" for name in text_to_image.cross_attention()}
        before, after = text_to_image.network.state_dict(), edited.network.state_dict()
        assert {n for n, v in after.items() if not torch.equal(v, before[n])} == expected

    def test_frozen_layers_stay(self, text_to_image, digit_captions, run):
        model = text_to_image.clone()
        first, *others = model.cross_attention().values()
        first.weight.requires_grad_(False)
        edited, _ = ConceptErasure().immunize(model, *digit_captions, run=run)
        after = list(edited.cross_attention().values())
        assert torch.equal(after[0].weight, first.weight)
        assert not torch.equal(after[1].weight, others[0].weight)
        for layer in others:
            layer.weight.requires_grad_(False)
        with pytest.raises(HoldfastError, match="no layer with trainable weights that makes keys or values"):
            ConceptErasure().immunize(model, *digit_captions, run=run)

    def test_captions_decide_and_images_do_not(self, text_to_image, digit_captions, run):
        benign, restricted = digit_captions
        edited = {
            ConceptErasure().immunize(text_to_image, own, other, run=run)[0].facts().sha256
            for own, other in ((benign, restricted), (benign.few_shot(3, 0), restricted.few_shot(5, 1)))
        }
        assert len(edited) == 1
        other = restricted.with_captions({"9": "a dog"})
        assert ConceptErasure().immunize(text_to_image, benign, other, run=run)[0].facts().sha256 not in edited

    def test_a_caption_that_is_preserved_cannot_be_erased(self, text_to_image, digit_captions, run):
        benign, restricted = digit_captions
        with pytest.raises(HoldfastError, match=r"caption 'a photo of the digit 9' has no token that the preserved"):
            ConceptErasure(preserve=("a photo of the digit 9",)).immunize(text_to_image, benign, restricted, run=run)

    def test_layers_that_read_other_vectors_are_refused(self, digit_captions, run):
        model = load_model(ModelSpec(name="text-unet", options={"widths": [8]}), digit_captions[0])
        next(iter(model.cross_attention().values())).register_forward_pre_hook(lambda _, args: (2 * args[0],))
        with pytest.raises(HoldfastError, match="do not read the text encoder's vectors, but a projection of them"):
            ConceptErasure().immunize(model, *digit_captions, run=run)

    def test_tasks_may_have_captions_of_two_lengths(self, text_to_image, digit_captions, run):
        benign = digit_captions[0]
        shorter = load_task("digits[8-9]@kind=text-to-image,caption=a photo of the digit {},length=8,train_limit=40")
        _, record = ConceptErasure(ridge=1e-6).immunize(text_to_image, benign, shorter, run=run)
        assert record.history["erased_tokens"] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": 0.0}, "concept-erasure: ridge is 0"),
        ({"preserve_weight": -1.0}, "preserve_weight is -1"),
        ({"ridge": float("nan")}, "ridge is nan"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(HoldfastError, match=message):
        ConceptErasure(**change)


def test_a_recipe_names_its_settings():
    made = build_defense({"name": "concept-erasure", "target": "a dog", "preserve": ["a cat"], "ridge": 0.1})
    assert made == ConceptErasure("a dog", ("a cat",), ridge=0.1)
