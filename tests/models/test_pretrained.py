"""Folders of `save_pretrained`, which other libraries read without Holdfast and without a network."""

from __future__ import annotations

import socket

import pytest
import timm
import torch
import transformers
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import (
    FAMILIES,
    Built,
    Denoiser,
    Family,
    ModelSpec,
    SplitModel,
    list_models,
    load_model,
    load_released,
    register,
)
from holdfast.tasks import load_task, load_tokenizer
from texts import reviews, save_models, tiny_vit

CPU = torch.device("cpu")
TIMM = "timm:test_resnet"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("the test used the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = save_models(tmp_path_factory.mktemp("models"))
    tiny_vit(num_labels=5).save_pretrained(root / "vit")
    return root


@pytest.fixture(scope="module")
def digits():
    return load_task("digits[0-4]")


@pytest.fixture(scope="module")
def images():
    return load_task("digits[0-4]@image_size=32,channels=3")


def loaded(spec, task):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return load_model(spec, task).eval()


def inputs(task):
    return next(iter(task.batches("test", 6, device=CPU))).x


def answers(model, task):
    with torch.no_grad():
        return model.eval()(inputs(task))


def with_extractor(model):
    width = model.head.weight.shape[1]
    theta = (
        torch.eye(width, dtype=torch.float64)
        + 0.3 * torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / width**0.5
    )
    model.insert_extractor(theta)
    return model


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class TestTimm:
    def test_timm_reads_the_weights_to_the_bit(self, images, tmp_path):
        model = loaded(TIMM, images)
        model.save_pretrained(tmp_path / "out")
        network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert_equal_states(network.state_dict(), model.network.state_dict())
        assert network.pretrained_cfg["mean"] == pytest.approx(model.mean.flatten().tolist())
        again = SplitModel.from_pretrained(tmp_path / "out", images)
        assert torch.equal(answers(again, images), answers(model, images))
        assert again.facts().sha256 == model.facts().sha256

    def test_one_channel_an_option_and_a_size_of_image(self, digits, tmp_path):
        task = load_task("digits[0-4]@image_size=32")
        for options, name in (({"depth": 1}, "timm:vit_tiny_patch16_224"), ({"drop_rate": 0.5}, TIMM)):
            model = loaded(ModelSpec(name=name, options=options), task)
            folder = model.save_pretrained(tmp_path / name[5:])
            network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            assert_equal_states(network.state_dict(), model.network.state_dict())
            assert torch.equal(answers(SplitModel.from_pretrained(folder, task), task), answers(model, task))

    def test_an_extractor_is_merged_and_the_model_stays(self, images, tmp_path):
        model = with_extractor(loaded(TIMM, images))
        before, digest = answers(model, images), model.facts().sha256
        with pytest.raises(HoldfastError, match=r"merge_extractor=True writes it .* without its immunization"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        folder = model.save_pretrained(tmp_path / "out", merge_extractor=True)
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x = (inputs(images) - model.mean) / model.std
        with torch.no_grad():
            assert torch.allclose(network(x), before, atol=1e-5)
        assert model.has_extractor
        assert model.facts().sha256 == digest


class TestVision:
    @pytest.mark.parametrize("extractor", [False, True])
    def test_transformers_read_it(self, places, digits, tmp_path, extractor):
        model = loaded(f"hf:{places / 'vit'}", digits)
        own = model.network.state_dict()
        if extractor:
            model = with_extractor(model.clone())
        before = answers(model, digits)
        folder = model.save_pretrained(tmp_path / "out", merge_extractor=extractor)
        network, found = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        assert len(network.config.id2label) == 5
        if not extractor:
            assert_equal_states(network.state_dict(), own)
        with torch.no_grad():
            assert torch.allclose(network.eval()(inputs(digits)).logits, before, atol=1e-5)
        assert torch.allclose(answers(SplitModel.from_pretrained(folder, digits), digits), before, atol=1e-5)

    def test_the_normalisation_is_written_for_the_preprocessor(self, places, digits, tmp_path):
        model = loaded(ModelSpec(name=f"hf:{places / 'vit'}", mean=(0.25,), std=(0.5,)), digits)
        folder = model.save_pretrained(tmp_path / "out")
        again = SplitModel.from_pretrained(folder, digits)
        assert again.mean.item() == pytest.approx(0.25)
        assert again.std.item() == pytest.approx(0.5)
        assert torch.allclose(answers(again, digits), answers(model, digits), atol=1e-5)


class TestText:
    @pytest.mark.parametrize("extractor", [False, True])
    @pytest.mark.parametrize("name", ["bert-classifier", "gpt2-classifier"])
    def test_transformers_read_classifiers_with_their_tokenizer(self, places, tmp_path, name, extractor):
        task = reviews(places, name)
        model = loaded(f"hf:{places / name}", task)
        if extractor:
            model = with_extractor(model)
        before, ids = answers(model, task), inputs(task)
        folder = model.save_pretrained(tmp_path / "out", merge_extractor=extractor)
        network, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        assert network.config.id2label == dict(enumerate(task.class_names))
        if not extractor:
            own = transformers.AutoModelForSequenceClassification.from_pretrained(places / name).state_dict()
            assert_equal_states(network.state_dict(), own)
        with torch.no_grad():
            logits = network.eval()(input_ids=ids, attention_mask=(ids != model.vocabulary.pad).long()).logits
        assert torch.allclose(logits, before, atol=1e-5)
        assert load_tokenizer(str(folder)).vocabulary.agrees(task.vocabulary)
        assert (
            transformers.AutoTokenizer.from_pretrained(folder)("good film")["input_ids"]
            == (transformers.AutoTokenizer.from_pretrained(places / name)("good film")["input_ids"])
        )
        assert torch.allclose(answers(SplitModel.from_pretrained(folder, task), task), before, atol=1e-5)

    @pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
    def test_a_pooled_encoder_comes_back_with_its_head(self, places, tmp_path, pooling):
        task = reviews(places, "bert")
        model = loaded(ModelSpec(name=f"hf:{places / 'bert'}", options={"pooling": pooling}), task)
        folder = model.save_pretrained(tmp_path / "out")
        body = transformers.AutoModel.from_pretrained(folder).state_dict()
        own = model.network.body.state_dict()
        assert all(torch.equal(body[name], tensor) for name, tensor in own.items())
        again = SplitModel.from_pretrained(folder, task)
        assert not again.fresh_head
        assert again.network.pooling == pooling
        assert_equal_states(again.network.state_dict(), model.network.state_dict())
        assert load_released(f"hf:{folder}", None, task).facts().sha256 == model.facts().sha256

    def test_a_missing_tokenizer_is_named_with_the_remedy(self, places, tmp_path):
        task = reviews(places, "bert")
        loaded(f"hf:{places / 'bert'}", task).save(tmp_path / "m.safetensors")
        model = load_released(str(tmp_path / "m.safetensors"), None, task)
        with pytest.raises(HoldfastError, match=r"tokenizer 'bert' was not found.*model\.tokenizer"):
            model.save_pretrained(tmp_path / "out")
        model.tokenizer = str(places / "bert")
        assert SplitModel.from_pretrained(model.save_pretrained(tmp_path / "out"), task).num_outputs == 2


class TestOthers:
    def test_diffusers_read_a_denoiser(self, denoiser, digit_images, tmp_path):
        diffusers = pytest.importorskip("diffusers")
        folder = denoiser.save_pretrained(tmp_path / "out")
        assert_equal_states(
            diffusers.DDPMPipeline.from_pretrained(folder).unet.state_dict(), denoiser.network.state_dict()
        )
        again = SplitModel.from_pretrained(folder, digit_images[0])
        assert isinstance(again, Denoiser)
        assert torch.equal(answers(again, digit_images[0]), answers(denoiser, digit_images[0]))

    def test_models_without_a_library_are_refused(self, model, tmp_path):
        for each in (model, SplitModel(nn.Sequential(nn.Linear(2, 2)), "0")):
            with pytest.raises(HoldfastError, match=r"not a model of transformers, timm or diffusers.*save\(FILE\)"):
                each.save_pretrained(tmp_path / "out")

    def test_saved_weights_are_read_from_their_folder_or_file(self, model, benign, tmp_path):
        model.save(tmp_path / "model.safetensors")
        for place in (tmp_path, tmp_path / "model.safetensors"):
            assert SplitModel.from_pretrained(place, benign).facts().sha256 == model.facts().sha256
        (tmp_path / "empty").mkdir()
        with pytest.raises(HoldfastError, match="it holds no model"):
            SplitModel.from_pretrained(tmp_path / "empty", benign)

    def test_a_shift_without_a_bias_is_refused(self):
        model = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3, bias=False)), "1")
        model.insert_eraser(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        with pytest.raises(HoldfastError, match=r"no bias.*save\(FILE\)"):
            model.without_extractor()

    def test_an_eraser_is_merged_with_its_shift(self):
        model = SplitModel(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)), "1")
        model.insert_eraser(torch.diag(torch.tensor([1.0, 0.0]).double()), torch.tensor([0.0, 3.0]).double())
        x = torch.rand(5, 4)
        merged = model.without_extractor()
        assert torch.allclose(merged(x), model(x), atol=1e-5)
        assert list(merged.network.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert merged.head.weight.dtype == torch.float32


class TestFamilies:
    def test_a_new_family_is_one_class(self, benign, tmp_path, monkeypatch):
        monkeypatch.setattr(FAMILIES, "_members", dict(FAMILIES.items()))

        @register("mine:NAME")
        class Mine(Family):
            def build(self, spec, input_shape, num_outputs, data_dir):
                width = int(spec.name.removeprefix("mine:"))
                layers = nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, num_outputs)
                return Built(nn.Sequential(*layers), spec, "3")

        model = load_model("mine:7", benign)
        assert model.head.in_features == 7
        assert model.fresh().head.in_features == 7
        model.save(tmp_path / "m.safetensors")
        again = load_released(str(tmp_path / "m.safetensors"), None, benign)
        assert again.facts().sha256 == model.facts().sha256
        assert "mine:NAME" in list_models()

    def test_the_names_of_models_are_listed(self):
        assert {"cnn", "unet", "timm:NAME", "hf:NAME", "diffusers:NAME", "file.py:FUNCTION"} <= set(list_models())
