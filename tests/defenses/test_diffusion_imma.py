"""IMMA of text-to-image models: its rounds are the equations', and the adaptation never reaches the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import reference
from holdfast.defenses import DiffusionIMMA, adaptations, build_defense
from holdfast.errors import HoldfastError
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks.text_to_image import caption_channel, caption_tokens, with_caption
from holdfast.training import Strategy
from holdfast.training.rare_tokens import Concepts, rare_tokens

CPU = torch.device("cpu")
PLAIN = Strategy("direct", "all", "sgd", 0.05, 8)
BRIEF = DiffusionIMMA(iterations=2, batch_size=8, guard=False, adaptation=Strategy(batch_size=8))
LORA = Strategy("direct", "lora-attention", "adam", 1e-2, 8, rank=2)


def called(task, prompts, batch):
    """Inputs and noise of a batch, with these prompts in place of its captions."""
    ids = caption_tokens(batch.x[:, -2])
    labels = (ids[:, None] == task.tokens[None]).all(2).float().argmax(1)
    channel = caption_channel(prompts[labels], tuple(batch.x.shape[2:]))
    return with_caption(batch.x[:, [*range(batch.x.shape[1] - 2), -1]], channel), batch.y


def moved_by(model, other):
    before = model.network.state_dict()
    return {n for n, v in other.network.state_dict().items() if not torch.equal(v, before[n])}


@pytest.mark.trains
class TestRounds:
    def test_they_are_the_equations(self, text_to_image, digit_captions, run):
        """Two rounds of two steps below: phi goes on, and moves along with theta."""
        _, restricted = digit_captions
        defense = dataclasses.replace(
            BRIEF, iterations=2, inner_steps=2, optimizer="sgd", learning_rate=0.2, clip=None, adaptation=PLAIN
        )
        made, record = defense.immunize(text_to_image, *digit_captions, run=run)
        below, above = [], []
        for number in range(2):
            with run.seeded("imma-diffusion", number, 0) as generator:
                stream = restricted.batches("train", 8, generator=generator, device=CPU)
                below.append([next(stream), next(stream)])
                above.append(next(restricted.batches("train", 8, generator=generator, device=CPU)))
        theta = {f"network.{n}.weight" for n in text_to_image.cross_attention()}
        expected = reference.bilevel_ascent(text_to_image, theta, below, above, 0.05, 0.2)
        for name, value in made.named_parameters():
            assert torch.allclose(value, expected[name], atol=1e-6), name
        assert moved_by(text_to_image, made) == {n.removeprefix("network.") for n in theta}
        assert all(len(series) == 2 for series in record.history.values())

    def test_dreambooth_is_below_with_a_rare_token_and_a_prior(self, text_to_image, digit_captions, run):
        """The reference reads the prompt as the caption, and batches of the prior as they are."""
        benign, restricted = digit_captions
        defense = dataclasses.replace(
            BRIEF, iterations=2, inner_steps=2, optimizer="sgd", learning_rate=0.2, clip=None, adaptation=PLAIN,
            method="dreambooth", prior_weight=0.3,
        )  # fmt: skip
        made, _ = defense.immunize(text_to_image, *digit_captions, run=run)
        shown = restricted.with_dropout(0.0)
        trained_on, _ = benign.holdout(defense.holdout, derive_seed(run.seed, defense.name, "holdout"))
        prior_task = trained_on.with_dropout(0.0)
        prompts = Concepts.of(shown).with_tokens(rare_tokens(text_to_image, shown, benign))
        below, prior, above = [], [], []
        for number in range(2):
            with run.seeded("imma-diffusion", number, 0) as generator:
                streams = [t.batches("train", 8, generator=generator, device=CPU) for t in (shown, prior_task)]
                pairs = [[next(stream) for stream in streams] for _ in range(2)]
                below.append([called(restricted, prompts, own) for own, _ in pairs])
                prior.append([other for _, other in pairs])
                batch = next(shown.batches("train", 8, generator=generator, device=CPU))
                above.append(called(restricted, prompts, batch))
        theta = {f"network.{n}.weight" for n in text_to_image.cross_attention()}
        expected = reference.bilevel_ascent(text_to_image, theta, below, above, 0.05, 0.2, prior, 0.3)
        for name, value in made.named_parameters():
            assert torch.allclose(value, expected[name], atol=1e-6), name

    def test_textual_inversion_is_below_by_the_vector_of_a_token(self, text_to_image, digit_captions, run):
        """One round, with plain descent of the table's free rows on a copy."""
        benign, restricted = digit_captions
        defense = dataclasses.replace(
            BRIEF, iterations=1, optimizer="sgd", learning_rate=0.2, clip=None, method="textual-inversion",
            adaptation=Strategy("direct", "all", "sgd", 5.0, 8, weight_decay=0.1),
        )  # fmt: skip
        made, _ = defense.immunize(text_to_image, *digit_captions, run=run)
        shown, copy = restricted.with_dropout(0.0), text_to_image.clone()
        concepts, (ids,) = Concepts.of(shown), rare_tokens(copy, shown, benign)
        table = copy.text.embedding.weight.detach().clone()
        for token, word in zip(ids, concepts.parts[0].words, strict=True):
            table[token] = table[list(word)].mean(0)
        with run.seeded("imma-diffusion", 0, 0) as generator:
            first, second = (
                called(
                    restricted, concepts.in_place(ids), next(shown.batches("train", 8, generator=generator, device=CPU))
                )
                for _ in range(2)
            )
        weight = copy.text.embedding.weight.requires_grad_(True)
        weight.data.copy_(table)
        slope = torch.autograd.grad((copy(first[0]) - first[1]).square().mean(), weight)[0]
        weight.data[ids] -= 5.0 * (slope + 0.1 * table)[ids]
        theta = {n: copy.network.get_submodule(n).weight for n in copy.cross_attention()}
        slopes = torch.autograd.grad((copy(second[0]) - second[1]).square().mean(), list(theta.values()))
        assert (weight - table)[ids].abs().max() > 1e-3
        for (name, before), up in zip(theta.items(), slopes, strict=True):
            assert torch.allclose(made.network.get_submodule(name).weight, before + 0.2 * up, atol=1e-6), name

    @pytest.mark.parametrize(
        ("adaptation", "method"),
        [
            (BRIEF.adaptation, "fine-tuning"),
            (LORA, "fine-tuning"),
            (LORA, "dreambooth"),
            (BRIEF.adaptation, "textual-inversion"),
        ],
    )
    def test_nothing_of_the_adaptation_reaches_the_model(self, text_to_image, digit_captions, run, adaptation, method):
        """With a rate of nearly nothing above, the model stays what it is, whatever was learned below."""
        still = dataclasses.replace(BRIEF, learning_rate=1e-12, adaptation=adaptation, inner_steps=2, method=method)
        made, _ = still.immunize(text_to_image, *digit_captions, run=run)
        for own, other in zip(made.parameters(), text_to_image.parameters(), strict=True):
            assert torch.allclose(own, other, atol=1e-9)
        moving = dataclasses.replace(still, learning_rate=1e-3, iterations=1)
        moving, _ = moving.immunize(text_to_image, *digit_captions, run=run)
        assert moved_by(text_to_image, moving) == {f"{n}.weight" for n in text_to_image.cross_attention()}
        assert list(moving.network.state_dict()) == list(text_to_image.network.state_dict())
        assert moving.prompts is None
        assert torch.equal(moving.text.embedding.weight, text_to_image.text.embedding.weight)

    def test_it_raises_the_loss_of_the_adapted_model(self, text_to_image, digit_captions):
        def adapted(rate):
            slow = Strategy(learning_rate=1e-4, batch_size=8)
            longer = dataclasses.replace(BRIEF, iterations=16, learning_rate=rate, adaptation=slow)
            losses = longer.immunize(text_to_image, *digit_captions, run=Run(0, CPU))[1].history["adapted_loss"]
            return sum(losses[-4:]) / 4

        assert adapted(3e-2) > 1.5 * adapted(1e-12)

    def test_the_benign_loss_pulls_back(self, text_to_image, digit_captions, run):
        def benign(weight):
            defense = dataclasses.replace(BRIEF, iterations=5, learning_rate=1e-2, benign_weight=weight)
            made, record = defense.immunize(text_to_image, *digit_captions, run=run)
            assert (record.history["benign_loss"][0] is not None) is (weight > 0)
            return digit_captions[0].score(made)

        assert benign(20.0) < benign(0.0)

    def test_an_adaptation_begins_again_after_its_lifetime(self, text_to_image, digit_captions, run, monkeypatch):
        begun = []

        class Counted(adaptations.Adaptation):
            def __init__(self, *given):
                begun.append(given[0])
                super().__init__(*given)

        monkeypatch.setitem(adaptations.METHODS, "fine-tuning", Counted)
        for lifetime, count in ((None, 1), (1, 3), (2, 2)):
            begun.clear()
            dataclasses.replace(BRIEF, iterations=3, lifetime=lifetime).immunize(
                text_to_image, *digit_captions, run=run
            )
            assert len(begun) == count

    def test_the_guard_goes_back_and_halves_the_rate(self, text_to_image, digit_captions, run):
        violent = dataclasses.replace(
            BRIEF, iterations=3, guard=True, guard_every=1, learning_rate=1.0, max_rollbacks=2, max_benign_drop=0.0
        )
        made, record = violent.immunize(text_to_image, *digit_captions, run=run)
        assert "learning_rate halved to 0.5" in record.events[0].message
        assert made.facts().sha256 == text_to_image.facts().sha256
        assert not record.completed

    def test_weights_that_the_owner_froze_stay(self, text_to_image, digit_captions, run):
        model = text_to_image.clone()
        first = next(iter(model.cross_attention()))
        model.network.get_submodule(first).requires_grad_(False)
        made, _ = BRIEF.immunize(model, *digit_captions, run=run)
        assert moved_by(model, made) == {f"{n}.weight" for n in model.cross_attention()} - {f"{first}.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_steps": 0}, "imma-diffusion: inner_steps is 0"),
        ({"lifetime": 0}, "lifetime is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"clip": -1.0}, "clip is -1"),
        ({"benign_weight": -1.0}, "benign_weight is -1"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"method": "dream"}, "method.*dreambooth"),
        ({"prior_weight": -0.1}, "prior_weight is -0.1"),
        ({"method": "textual-inversion", "adaptation": LORA}, "adaptation has scope 'lora-attention', which textual"),
        ({"adaptation": Strategy("head")}, "adaptation starts from 'head'"),
        ({"adaptation": Strategy(warmup=3)}, "adaptation has the schedule 'constant' with a warm-up of 3"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(HoldfastError, match=message):
        DiffusionIMMA(**change)


def test_an_adaptation_that_cannot_start_is_refused(text_to_image, digit_captions, run):
    with pytest.raises(HoldfastError, match=r"cannot be adapted: weights of 4 bits.*Set adaptation"):
        dataclasses.replace(BRIEF, adaptation=Strategy(scope="qlora")).immunize(text_to_image, *digit_captions, run=run)


def test_a_method_for_which_captions_leave_no_room_is_refused(text_to_image, digit_captions, run):
    benign, restricted = digit_captions
    long = restricted.with_captions(dict.fromkeys(restricted.class_names, " ".join(["long"] * 40)))
    with pytest.raises(HoldfastError, match=r"by dreambooth: captions have .* no room.*Set method"):
        dataclasses.replace(BRIEF, method="dreambooth").immunize(text_to_image, benign, long, run=run)


def test_a_recipe_names_its_settings():
    below = {"scope": "lora-attention", "learning_rate": 0.01}
    made = build_defense({"name": "imma-diffusion", "inner_steps": 3, "adaptation": below})
    assert made == DiffusionIMMA(inner_steps=3, adaptation=Strategy(scope="lora-attention", learning_rate=0.01))
    assert build_defense({"name": made.name, **made.config()}) == made
    with pytest.raises(HoldfastError, match="learning_rates"):
        build_defense({"name": "imma-diffusion", "adaptation": {"learning_rates": 0.1}})
