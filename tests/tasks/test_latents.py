"""Latents in place of images, and captions as the tokenizers of a pipeline read them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import pipelines
from holdfast.errors import HoldfastError
from holdfast.models import load_task_for, read_by
from holdfast.tasks import TextToImageTask, load_task, load_tokenizer
from holdfast.tasks.latents import Autoencoder

diffusers = pytest.importorskip("diffusers")

PIXELS = "digits[0-2]@kind=text-to-image,length=12,image_size=16,channels=3,train_limit=12,test_limit=8"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stable Diffusion with an autoencoder that shifts and scales."""
    folder = pipelines.saved(tmp_path_factory.mktemp("pipeline") / "tiny")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipelines.autoencoder(shift_factor=0.25).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def task(folder, tmp_path_factory):
    return load_task(f"{PIXELS},autoencoder={folder}", data_dir=tmp_path_factory.mktemp("data"))


def plain(folder):
    return diffusers.AutoencoderKL.from_pretrained(folder / "vae")


class TestLatents:
    def test_they_are_what_diffusers_encodes(self, folder, task):
        images = load_task(PIXELS).images("test")
        with torch.no_grad():
            expected = (plain(folder).encode(images).latent_dist.mean - 0.25) * 0.5
        assert task.images("test").dtype == torch.float32
        assert torch.allclose(task.images("test"), expected, atol=1e-5)
        assert (task.input_shape, task.output_shape) == ((6, 8, 8), (4, 8, 8))
        assert task.autoencoder.name == "tiny/vae"

    def test_pixels_are_what_diffusers_decodes(self, folder, task):
        latents = task.images("test")
        with torch.no_grad():
            expected = (plain(folder).decode(latents / 0.5 + 0.25).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(task.pixels(latents), expected, atol=1e-5)
        pixels = load_task(PIXELS)
        assert torch.allclose(pixels.pixels(pixels.images("test")), pixels.images("test") / 2 + 0.5, atol=1e-6)

    def test_means_and_deviations_of_channels(self, tmp_path):
        """As the pipeline of SDXL decodes them: latents deviation / scaling_factor + mean."""
        made = pipelines.autoencoder(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 3.0, 4.0])
        made.save_pretrained(tmp_path / "vae")
        images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        found = Autoencoder(tmp_path / "vae").encode(images)
        mean, deviation = torch.arange(4.0).view(-1, 1, 1), torch.arange(1.0, 5.0).view(-1, 1, 1)
        with torch.no_grad():
            expected = made.encode(images.float() / 127.5 - 1).latent_dist.mean
        assert torch.allclose(found * deviation / 0.5 + mean, expected, atol=1e-5)

    def test_they_do_not_depend_on_other_images_and_are_kept(self, folder, tmp_path, monkeypatch):
        autoencoder = Autoencoder(folder)
        images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images[3] = images[1]
        found = autoencoder.latents(images, tmp_path)
        assert torch.equal(found[3], found[1])
        assert torch.equal(found[2:3], autoencoder.latents(images[2:3], tmp_path))
        files = sorted(path.name for path in (tmp_path / "latents").iterdir())
        assert len(files) == 2
        assert all(name.endswith(".safetensors") for name in files)
        monkeypatch.setattr(Autoencoder, "encode", lambda *_: pytest.fail("they were encoded again"))
        assert torch.equal(Autoencoder(folder).latents(images, tmp_path), found)

    def test_other_weights_and_other_images_are_not_mixed_up(self, folder, tmp_path):
        images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        other = pipelines.autoencoder(scaling_factor=2.0)
        other.load_state_dict(plain(folder).state_dict())
        other.save_pretrained(tmp_path / "other")
        one, two = Autoencoder(folder), Autoencoder(tmp_path / "other")
        assert one.sha256 != two.sha256
        found = [a.latents(x, tmp_path) for a in (one, two) for x in (images, images + 1)]
        assert len({x.numpy().tobytes() for x in found}) == 4

    def test_a_task_of_latents_is_cut_and_split_as_any_other(self, task):
        first, second = task.halves(0)
        rows = {row.numpy().tobytes() for row in task.images("train")}
        assert {row.numpy().tobytes() for half in (first, second) for row in half.images("train")} == rows
        assert first.size("train") + second.size("train") == task.size("train") == 12
        assert task.few_shot(3, 0).size("train") == 3
        assert task.limit_test(4, 0).size("test") == 4
        assert task.subset([0, 2]).images("train").shape[1:] == (4, 8, 8)
        assert task.with_timesteps([5]).autoencoder is task.autoencoder
        assert len({t.facts().sha256 for t in (task, first, second, load_task(PIXELS))}) == 4

    def test_it_is_pickled_without_the_weights(self, task):
        assert task.autoencoder.module is not None
        again = pickle.loads(pickle.dumps(task))
        assert "module" not in vars(again.autoencoder)
        assert torch.equal(again.pixels(again.images("test")[:1]), task.pixels(task.images("test")[:1]))

    def test_a_batch_is_noise_on_latents(self, task):
        batch = next(task.batches("train", 6, generator=torch.Generator().manual_seed(0), device=CPU))
        t = batch.x[:, -1, 0, 0].long()
        signal, spread = task.schedule.shares(t, CPU)
        clean = (batch.x[:, :4] - spread * batch.y) / signal
        known = task.images("train")
        near = t < 500
        assert near.any()
        assert all(((known - x).abs().amax((1, 2, 3)) < 1e-3).any() for x in clean[near])

    @pytest.mark.parametrize(("settings", "message"), [
        ("channels=1,image_size=16", "takes images of 3 channels .* have 1 and 16 x 16"),
        ("channels=3,image_size=17", "multiples of 2, and these have 3 and 17 x 17"),
    ])  # fmt: skip
    def test_images_that_the_autoencoder_does_not_take(self, folder, tmp_path, settings, message):
        with pytest.raises(HoldfastError, match=message):
            load_task(f"digits[0-1]@kind=text-to-image,{settings},autoencoder={folder}", data_dir=tmp_path)

    def test_refusals(self, folder, task, tmp_path):
        with pytest.raises(HoldfastError, match="no autoencoder at 'nowhere'"):
            load_task(f"{PIXELS},autoencoder=nowhere", data_dir=tmp_path)
        with pytest.raises(HoldfastError, match="holds no autoencoder"):
            Autoencoder(tmp_path)
        with pytest.raises(HoldfastError, match="cannot be loaded as an AutoencoderKL in safetensors"):
            _ = Autoencoder(folder / "unet").module
        with pytest.raises(HoldfastError, match="autoencoder is for kind=text-to-image"):
            load_task(f"digits@kind=denoising,autoencoder={folder}")
        with pytest.raises(HoldfastError, match="are latents of tiny/vae already"):
            task.in_latents(task.autoencoder, tmp_path)
        with pytest.raises(HoldfastError, match="latents cannot be resized"):
            task.as_images(8)
        with pytest.raises(HoldfastError, match=r"captions have 12 tokens, and images 9 pixels.*length to at most 8"):
            load_task("digits[0-1]@kind=text-to-image,length=12,image_size=3")


class TestReadBy:
    def test_a_pipeline_gives_its_tokenizer_noise_and_autoencoder(self, folder, tmp_path):
        for model in (f"diffusers:{folder}", str(folder)):
            spec = read_by("digits@kind=text-to-image", model)
            assert (spec.tokenizer, spec.schedule, spec.autoencoder) == (str(folder),) * 3
        named = read_by("digits@kind=text-to-image,tokenizer=words,schedule=linear,autoencoder=mine", str(folder))
        assert named == "digits@kind=text-to-image,tokenizer=words,schedule=linear,autoencoder=mine"
        assert read_by("digits@kind=denoising", str(folder)) == "digits@kind=denoising"
        task = load_task_for(PIXELS, str(folder), data_dir=tmp_path)
        assert isinstance(task, TextToImageTask)
        assert task.schedule.describe() == "scaled_linear, 1000 steps, beta 0.00085 to 0.012"

    def test_an_unconditional_pipeline_gives_nothing(self, tmp_path):
        network = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
        diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
        assert read_by("digits@kind=text-to-image", str(tmp_path)) == "digits@kind=text-to-image"
        with pytest.raises(HoldfastError, match="a pipeline without a tokenizer"):
            load_tokenizer(str(tmp_path))


class TestTokenizers:
    @pytest.mark.parametrize("kind", pipelines.PIPELINES)
    def test_rows_are_what_each_of_the_pipelines_tokenizers_makes(self, tmp_path, kind):
        made = pipelines.PIPELINES[kind]()
        for name, part in made.components.items():
            if name.startswith(("tokenizer", "text_encoder")):
                part.save_pretrained(tmp_path / name)
        made.save_config(tmp_path)
        tokenizer = load_tokenizer(str(tmp_path))
        texts = ["A b 1", "", "a very long caption of many letters"]
        names = [n for n in ("tokenizer", "tokenizer_2", "tokenizer_3") if made.components.get(n) is not None]
        shown = [text.lower() for text in texts] if kind == "pixart" else texts
        expected = [
            made.components[n](shown, padding="max_length", max_length=12, truncation=True)["input_ids"] for n in names
        ]
        assert np.array_equal(tokenizer.encode(texts, 12), np.concatenate(expected, 1))
        usual = {"pixart": 120, "flux": 512, "sd3": 256}.get(kind, 12)
        assert tokenizer.length == usual

    def test_more_tokens_than_the_encoder_reads(self, folder):
        with pytest.raises(HoldfastError, match="length is 13, and the text encoders of 'tiny' read at most 12"):
            load_tokenizer(str(folder)).encode(["a"], 13)

    def test_small_images_are_enlarged_before_a_caption_takes_their_pixels(self):
        task = load_task("digits[0-1]@kind=text-to-image,length=77,image_size=16,test_limit=40")
        assert (task.input_shape, task.size("test"), task.class_names) == ((3, 16, 16), 40, ["0", "1"])

    def test_a_pipelines_length_is_the_default(self, folder):
        assert load_task(f"digits[0-1]@kind=text-to-image,tokenizer={folder}").length == 12
        assert load_task("digits[0-1]@kind=text-to-image").length == 16

    @pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, "\xff"])
    def test_a_damaged_index(self, tmp_path, text):
        (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
        with pytest.raises(HoldfastError, match="not a folder of a diffusers pipeline"):
            load_tokenizer(str(tmp_path))
