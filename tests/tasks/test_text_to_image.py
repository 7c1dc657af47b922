"""Tasks of images with captions: batches, captions as channels, and what narrowing keeps together."""

from __future__ import annotations

import contextlib
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from holdfast.errors import HoldfastError
from holdfast.tasks import (
    ArrayTask,
    DenoisingTask,
    Schedule,
    TextToImageTask,
    load_task,
    load_tokenizer,
    text_to_image,
)
from holdfast.tasks.data_checks import validate
from holdfast.tasks.denoising import BLOCK
from holdfast.tasks.splits import halves
from holdfast.tasks.text_to_image import LENGTH, caption_channel, caption_tokens

CPU = torch.device("cpu")
DIGITS = "digits@kind=text-to-image,caption=a photo of the digit {}"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> TextToImageTask:
    task = load_task(DIGITS)
    assert isinstance(task, TextToImageTask)
    return task


def one_each(train: int = 60, test: int = 20, *, side: int = 5, **more) -> TextToImageTask:
    """A caption for every image, which tells its pixels: their first three."""
    x = np.random.default_rng(0).integers(0, 256, (train + test, side, side, 3), dtype=np.uint8)
    names = [told(pixels) for pixels in x.reshape(len(x), -1)]
    y = np.random.default_rng(1).permutation(len(x))  # captions in another order than images
    shuffled = np.empty(len(x), dtype=object)
    shuffled[y] = names
    return TextToImageTask("one each", x[:train], y[:train], x[train:], y[train:], list(shuffled), **more)


def told(pixels) -> str:
    return " ".join(str(int(v)) for v in pixels[:3])


def check_together(task: TextToImageTask, seen=lambda pixels: pixels) -> None:
    """Every stored image has the caption that tells its pixels."""
    captions = task.captions
    for split in ("train", "test"):
        rows = task._x[split].movedim(1, -1).flatten(1)
        assert len(rows) == len(task._y[split]) > 0
        for pixels, y in zip(rows, task._y[split], strict=True):
            assert captions[y] == told(seen(pixels))
        ids = task.caption_ids(task._y[split])
        expected = task.tokenizer.encode([captions[y] for y in task._y[split]], task.length)
        assert torch.equal(ids, torch.from_numpy(expected))


class TestNarrowing:
    @pytest.mark.parametrize(
        "narrow",
        [
            lambda t: t.halves(0)[0], lambda t: t.halves(0)[1], lambda t: halves(t)[1].few_shot(5, 3),
            lambda t: t.holdout(0.2, 1)[0], lambda t: t.holdout(0.2, 1)[1], lambda t: t.limit_train(17, 2),
            lambda t: t.limit_test(7, 2), lambda t: t.subset(range(3, 70)), lambda t: t.subset([*range(70, 20, -1)]),
            lambda t: t.as_images(None, 3), lambda t: t.with_dropout(0.5), lambda t: t.with_timesteps([3, 5]),
            lambda t: t.with_schedule(Schedule.named("sigmoid")), lambda t: pickle.loads(pickle.dumps(t)),
            lambda t: t.subset(range(60)).halves(0)[1].limit_test(4, 0).few_shot(3, 1).with_dropout(0.2),
        ],
    )  # fmt: skip
    def test_captions_stay_with_their_images(self, narrow):
        whole = one_each()
        check_together(whole)
        narrowed = narrow(whole)
        check_together(narrowed)
        assert isinstance(narrowed, TextToImageTask)
        check_together(whole)  # and it is another task

    @given(data=st.data())
    @settings(max_examples=25)
    def test_in_any_order(self, data):
        task = one_each(40, 15)
        steps = {
            "half": lambda t, n: t.halves(n)[n % 2],
            "shots": lambda t, n: t.few_shot(max(1, t.size("train") - n), n),
            "hold": lambda t, n: t.holdout(0.1, n)[n % 2],
            "train": lambda t, n: t.limit_train(3 + n, n),
            "test": lambda t, n: t.limit_test(2 + n, n),
            "classes": lambda t, n: t.subset(range(len(t.class_names) - n)),
        }
        for name in data.draw(st.lists(st.sampled_from(sorted(steps)), min_size=1, max_size=4)):
            number = data.draw(st.integers(0, 5))
            with contextlib.suppress(HoldfastError):  # too few images are left for one more step
                task = steps[name](task, number)
        check_together(task)

    def test_inverted_and_resized_images_keep_their_captions(self):
        task = one_each()
        check_together(task.inverted(), lambda pixels: 255 - pixels)
        larger = task.as_images(8)
        assert torch.equal(larger._y["train"], task._y["train"])
        assert (larger.captions, larger.input_shape) == (task.captions, (5, 8, 8))
        grey = task.as_images(None, 1)
        assert (grey.input_shape, grey.output_shape) == ((3, 5, 5), (1, 5, 5))

    def test_other_captions_stay_with_their_images(self):
        task = one_each(length=8)
        a, b, c = (int(y) for y in (task._y["train"][0], task._y["test"][0], task._y["test"][1]))
        first, second = task.class_names[a], task.class_names[b]
        changed = task.with_captions({first: "a cat", second: "a dog"})
        assert [changed.captions[i] for i in (a, b, c)] == ["a cat", "a dog", task.class_names[c]]
        assert task.captions[a] == first
        expected = torch.from_numpy(task.tokenizer.encode(["a cat", "a dog", ""], 8))
        assert torch.equal(changed.caption_ids(torch.tensor([a, b, -1])), expected)
        part = changed.subset([b, c, a])
        assert part.captions == ["a dog", task.class_names[c], "a cat"]
        assert torch.equal(part.caption_ids(torch.tensor([0, 2])), expected[[1, 0]])
        assert torch.equal(part._x["train"][0], task._x["train"][0])
        assert changed.with_dropout(0.3).captions == changed.captions
        assert changed.facts().sha256 != task.facts().sha256
        assert changed.with_captions({first: first, second: second}).facts().sha256 == task.facts().sha256
        with pytest.raises(HoldfastError, match="no images of 'a cat'"):
            changed.with_captions({"a cat": "a lion"})

    @pytest.mark.parametrize("data", ["faces", "mnist", "cifar10", "imagenette64"])
    def test_real_data_as_recipes_take_it(self, few_data, data):
        if not (few_data / f"{data}.npz").is_file():
            pytest.skip(f"{data}.npz is not in the data folder")
        spec = f"{data}@kind=text-to-image,image_size=16,channels=3,test_limit=40,caption=a photo of a {{}} thing"
        task = load_task(spec, data_dir=few_data)
        plain = load_task(spec.partition(",caption")[0].replace("text-to-image", "denoising"), data_dir=few_data)
        assert (task.input_shape, task.output_shape, task.size("test")) == (
            (5, 16, 16),
            (3, 16, 16),
            plain.size("test"),
        )
        assert task.captions == [f"a photo of a {name} thing" for name in task.class_names]
        assert (task.hashes("train"), task.chance) == (plain.hashes("train"), plain.chance)
        ours, theirs = halves(task)
        assert ours.size("train") + theirs.size("train") == task.size("train")
        assert theirs.few_shot(6, 0).size("train") == 6
        assert task.with_timesteps([1]).facts().sha256 != task.facts().sha256
        assert load_task(spec, data_dir=few_data).facts() == task.facts()

    def test_readings_are_made_of_it(self):
        benign, restricted = (load_task(DIGITS.replace("digits@", f"digits[{c}]@")) for c in ("0-7", "8-9"))
        checked = validate({"benign": benign, "restricted": restricted})
        assert checked.flags == []
        assert "8 classes (0, 1, 2, 3, 4, ...)" in checked.lines()[0]

    def test_captions_of_single_images_are_not_listed_as_classes(self, monkeypatch):
        task = one_each()
        read = validate({"benign": task}).facts["benign"].read
        assert (len(read.class_names), len(read.samples["train"])) == (80, 80)
        monkeypatch.setattr(text_to_image, "MOST_CLASSES", 79)
        read = validate({"benign": task}).facts["benign"].read
        assert (read.class_names, read.samples) == ([], {})

    def test_the_same_images_with_other_captions_are_other_data(self, digits):
        with pytest.raises(HoldfastError, match="are the same data"):
            validate({"benign": digits, "restricted": digits.subset([*range(9, -1, -1)])})
        other = digits.with_captions({"3": "a drawing"})
        assert [flag.name for flag in validate({"benign": digits, "restricted": other}).flags] == [
            "Tasks that share samples"
        ]


class TestBatches:
    @staticmethod
    def by_hand(task: TextToImageTask, images: np.ndarray, labels: np.ndarray):
        """The test batch of a plain loop: one image after another, in the order that they have."""
        count, (channels, *sides) = len(images), task.output_shape
        order = torch.randperm(count, generator=seeded(count)).tolist()
        x = np.zeros((count, channels + 2, *sides))
        y = np.zeros((count, channels, *sides))
        for i in range(count):
            noise = torch.randn((BLOCK, channels, *sides), generator=seeded(i // BLOCK))[i % BLOCK].double().numpy()
            t = (2 * order[i] + 1) * task.schedule.steps // (2 * count)
            a = float(task.schedule.alpha_bar[t])
            clean = images[i].astype(float).reshape(*sides, channels).transpose(2, 0, 1) / 127.5 - 1
            x[i, :channels] = a**0.5 * clean + (1 - a) ** 0.5 * noise
            ids = task.tokenizer.encode([task.captions[labels[i]]], task.length)[0]
            flat = [len(ids), *ids, *[0] * (sides[0] * sides[1] - len(ids) - 1)]
            x[i, channels] = np.array(flat).reshape(sides)
            x[i, channels + 1] = t
            y[i] = noise
        return torch.from_numpy(x), torch.from_numpy(y)

    @pytest.mark.parametrize("size", [7, 500, 1000])
    def test_sweep_is_that_of_a_plain_loop(self, size):
        rng = np.random.default_rng(3)
        images, labels = rng.integers(0, 256, (520, 4, 5), dtype=np.uint8), rng.integers(0, 3, 520)
        task = TextToImageTask("by hand", images[:9], labels[:9], images, labels, ["a", "b c", "d"], length=6)
        x, y = (torch.cat(parts) for parts in zip(*task.sweep("test", size, device=CPU), strict=True))
        wanted_x, wanted_y = self.by_hand(task, images, labels)
        assert torch.equal(x[:, 1:].double(), wanted_x[:, 1:])
        assert torch.allclose(x.double(), wanted_x, atol=1e-5)
        assert torch.equal(y.double(), wanted_y)

    def test_noise_and_steps_are_those_of_the_denoising_task(self, digits):
        plain = load_task("digits@kind=denoising")
        assert digits.chance == plain.chance
        for split in ("test", "train"):
            for captioned, bare in zip(*(t.sweep(split, 400, device=CPU) for t in (digits, plain)), strict=True):
                assert torch.equal(captioned.x[:, [0, 2]], bare.x)
                assert torch.equal(captioned.y, bare.y)
        whole = digits.with_dropout(0)
        drawn = [next(t.batches("train", 300, generator=seeded(4), device=CPU)) for t in (whole, plain)]
        assert torch.equal(drawn[0].x[:, [0, 2]], drawn[1].x)

    def test_every_test_image_has_its_caption(self, digits):
        rows = torch.cat([caption_tokens(b.x[:, 1]) for b in digits.batches("test", 100, device=CPU)])
        assert torch.equal(rows, digits.caption_ids(digits.labels("test")))
        assert not (rows == digits.caption_ids(torch.tensor([-1]))).all(1).any()

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
    def test_the_share_of_captions_that_are_left_out(self, digits, share):
        task = digits.with_dropout(share)
        batches = task.batches("train", 1000, generator=seeded(), device=CPU)
        rows = torch.cat([caption_tokens(next(batches).x[:, 1]) for _ in range(6)])
        empty = (rows == task.caption_ids(torch.tensor([-1]))).all(1)
        spread = (share * (1 - share) / len(rows)) ** 0.5
        assert abs(float(empty.float().mean()) - share) <= 4 * spread
        known = {tuple(row) for row in task.tokens.tolist()}
        assert {tuple(row) for row in rows.tolist()} == (known if share else known - {tuple(task.tokens[-1].tolist())})

    def test_training_is_by_the_generator_alone(self, digits):
        def first(seed):
            batches = digits.batches("train", 700, generator=seeded(seed), device=CPU)
            return torch.cat([next(batches).x for _ in range(3)])

        assert torch.equal(first(0), first(0))
        assert not torch.equal(first(0)[:, 1], first(1)[:, 1])

    def test_inputs_take_any_caption(self, digits):
        noised = torch.randn(2, 2, 8, 8, generator=seeded())
        x = digits.inputs(noised, torch.tensor([4, -1]))
        assert torch.equal(x[:, [0, 2]], noised)
        assert torch.equal(caption_tokens(x[:, 1]), digits.tokens[[4, -1]])

    def test_a_pickled_task_gives_the_same_batches(self, digits):
        other = pickle.loads(pickle.dumps(digits))
        ours, theirs = (next(t.batches("train", 50, generator=seeded(), device=CPU)) for t in (digits, other))
        assert torch.equal(ours.x, theirs.x)
        assert other.facts() == digits.facts()


class TestCaptionChannels:
    @given(data=st.data())
    @settings(max_examples=60)
    def test_ids_come_back(self, data):
        sides = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda s: s[0] * s[1] > 1))
        length = data.draw(st.integers(1, sides[0] * sides[1] - 1))
        count = data.draw(st.integers(0, 4))
        ids = st.lists(st.integers(0, 2**24 - 1), min_size=length, max_size=length)
        tokens = torch.tensor(data.draw(st.lists(ids, min_size=count, max_size=count)), dtype=torch.int64)
        tokens = tokens.view(count, length)
        channel = caption_channel(tokens, sides)
        assert channel.shape == (count, 1, *sides)
        assert channel.dtype == torch.float32
        found = caption_tokens(channel[:, 0])
        assert found.tolist() == tokens.tolist()

    def test_too_few_pixels(self):
        with pytest.raises(HoldfastError, match="A caption of 4 tokens does not fit into an image of 2 x 2 pixels"):
            caption_channel(torch.zeros(1, 4, dtype=torch.int64), (2, 2))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                "length=64",
                "captions have 64 tokens, and images 64 pixels.*set length to at most 63, or a larger image_size",
            ),
            ("caption=a photo", "caption is 'a photo'; expected a text with {} for the name"),
            ("caption_dropout=1", "caption_dropout is '1'"),
            ("caption_dropout=-0.1", "caption_dropout is '-0.1'"),
            ("length=0", "length is '0'"),
            ("timesteps=1000", "timesteps are"),
        ],
    )
    def test_values_out_of_range(self, settings, words):
        with pytest.raises(HoldfastError, match=words):
            load_task(f"digits@kind=text-to-image,{settings}")

    @pytest.mark.parametrize(("key", "value"), [("dropout", 1), ("dropout", -0.5), ("length", 0), ("template", "a")])
    def test_of_the_constructor(self, key, value):
        with pytest.raises(HoldfastError, match=f"is {value!r}; expected"):
            one_each(**{key: value})

    def test_they_are_for_this_kind(self):
        for setting in ("caption=a {}", "caption_dropout=0.2"):
            with pytest.raises(HoldfastError, match="is for kind=text-to-image, and its kind is denoising"):
                load_task(f"digits@kind=denoising,{setting}")

    def test_of_the_longest_caption_that_fits(self):
        task = load_task("digits@kind=text-to-image,length=63")
        batch = next(task.batches("test", 3, device=CPU))
        assert torch.equal(caption_tokens(batch.x[:, 1]), task.caption_ids(task.labels("test")[:3]))

    def test_other_braces_are_text(self):
        task = one_each(4, 3, template="{} {a} {{}}")
        assert task.captions[0] == f"{task.class_names[0]} {{a}} {{{task.class_names[0]}}}"

    def test_captions_decide_the_hash_and_dropout_does_not(self, digits):
        other = load_task(DIGITS.replace("photo", "picture"))
        assert other.facts().sha256 != digits.facts().sha256
        assert digits.with_dropout(0.7).facts() == digits.facts()
        assert load_task("digits@kind=denoising").facts().sha256 != digits.facts().sha256

    def test_it_is_the_task_over_a_classification(self, digits):
        plain = load_task("digits")
        assert isinstance(plain, ArrayTask)
        captioned = TextToImageTask.captioned(plain, template="a photo of the digit {}")
        assert captioned.facts() == digits.facts()
        assert (captioned.length, captioned.dropout, captioned.vocabulary) == (
            LENGTH, 0.1, load_tokenizer("words").vocabulary,
        )  # fmt: skip
        assert type(DenoisingTask.of(plain)).answers_with != captioned.answers_with
        with pytest.raises(HoldfastError, match="its inputs are not images"):
            TextToImageTask.captioned(ArrayTask("v", np.eye(4), [0, 0, 1, 1], np.eye(4), [0, 0, 1, 1]))

    def test_tokens_beyond_a_models_embeddings_are_named(self, digits):
        largest = int(digits.tokens.max())
        assert digits.token_beyond(largest + 1) is None
        assert str(largest) in str(digits.token_beyond(largest))
        assert "a photo of the digit" in str(digits.token_beyond(largest))
