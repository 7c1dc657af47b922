from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, check_fits, load_model, load_released
from holdfast.runtime.storage import save_tensors
from holdfast.tasks import TaskSpec, load_task


@pytest.fixture(scope="module")
def images():
    return load_task(TaskSpec(data="digits[0-4]", image_size=32, channels=3))


class TestSplitModel:
    def test_features_are_what_the_head_receives(self, model, benign):
        batch = next(benign.batches("test", 6, device=torch.device("cpu")))
        model.eval()
        assert torch.allclose(model.head(model.features(batch.x)), model(batch.x), atol=1e-6)

    def test_reset_head_changes_the_head_alone(self, model):
        before = {n: p.clone() for n, p in model.network.named_parameters()}
        model.reset_head(3)
        assert model.num_outputs == 3
        for name, parameter in model.network.named_parameters():
            assert name.startswith("head.") or torch.equal(before[name], parameter)

    def test_fresh_is_new_and_seeded(self, model):
        def fresh(seed):
            torch.manual_seed(seed)
            return model.fresh()

        assert fresh(1).facts().sha256 == fresh(1).facts().sha256 != fresh(2).facts().sha256
        assert fresh(1).facts().sha256 != model.facts().sha256

    def test_fresh_without_a_factory_resets_every_layer(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        model = SplitModel(network, "3")
        model(torch.randn(16, 4))
        fresh = model.fresh()
        assert not torch.equal(fresh.network[0].weight, network[0].weight)
        assert torch.equal(fresh.network[1].running_mean, torch.zeros(8))

    def test_fresh_names_the_layer_that_cannot(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1))
                self.out = nn.Linear(4, 2)

            def forward(self, x):
                return self.out(x * self.scale)

        with pytest.raises(HoldfastError, match=r"\(root\).*Odd.*give the model a factory"):
            SplitModel(Odd(), "out").fresh()

    def test_training_a_clone_leaves_the_model_alone(self, model):
        digest = model.facts().sha256
        clone = model.clone()
        with torch.no_grad():
            next(clone.parameters()).add_(1)
        assert model.facts().sha256 == digest != clone.facts().sha256

    def test_hooks_and_notes_of_a_clone_are_its_own(self, model):
        """Also dictionaries of hooks, which are empty when they are copied."""
        first = next(iter(model.network.modules()))
        first.notes = first.the_same = {}
        clone = model.clone()
        copied = next(iter(clone.network.modules()))
        clone.head.register_forward_hook(lambda *_: pytest.fail("the original runs the clone's hook"))
        copied.notes["of"] = "the clone"
        assert copied.the_same is copied.notes
        assert first.notes == {}
        model(torch.rand(2, 1, 8, 8))

    def test_the_hash_sees_buffers(self, model):
        digest = model.facts().sha256
        model.train()
        model(torch.rand(8, 1, 8, 8))
        assert model.facts().sha256 != digest

    @pytest.mark.parametrize(
        ("head", "message"), [("nothing", "no layer 'nothing'.*'2'"), ("1", "is ReLU; expected Linear")]
    )
    def test_head_refusals(self, head, message):
        with pytest.raises(HoldfastError, match=message):
            SplitModel(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), head)

    def test_a_convolution_as_head_must_be_1x1(self):
        def wrap(kernel):
            return SplitModel(nn.Sequential(nn.AdaptiveAvgPool2d(kernel), nn.Conv2d(3, 5, kernel)), "1")

        assert wrap(1)(torch.zeros(2, 3, 4, 4)).shape == (2, 5)
        with pytest.raises(HoldfastError, match="must be 1x1"):
            wrap(3)

    def test_normalisation_refusals(self):
        with pytest.raises(HoldfastError, match="together"):
            SplitModel(nn.Sequential(nn.Linear(2, 2)), "0", mean=[0.5])
        with pytest.raises(HoldfastError, match="above 0"):
            SplitModel(nn.Sequential(nn.Linear(2, 2)), "0", mean=[0.5], std=[0.0])


def contiguous(model):
    return {n: v.contiguous() for n, v in model.network.state_dict().items()}


class TestFiles:
    def test_round_trip_rebuilds_the_architecture(self, model, benign, tmp_path):
        model.save(tmp_path / "model.safetensors")
        again = load_released(str(tmp_path / "model.safetensors"), None, benign)
        assert again.facts().sha256 == model.facts().sha256

    def test_the_state_dict_is_the_plain_architectures(self, images, tmp_path):
        split = load_model("timm:resnet18", images)
        split.save(tmp_path / "m.safetensors")
        plain = timm.create_model("resnet18", num_classes=5)
        from safetensors.torch import load_file

        plain.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)

    def test_a_saved_model_never_asks_for_pretrained_weights_again(self, images, tmp_path, monkeypatch):
        made = []
        create = timm.create_model
        monkeypatch.setattr(
            timm, "create_model", lambda *a, pretrained=False, **k: made.append(pretrained) or create(*a, **k)
        )
        first = load_model(ModelSpec(name="timm:resnet18", options={"pretrained": True}), images)
        first.save(tmp_path / "m.safetensors")
        load_released(str(tmp_path / "m.safetensors"), None, images).fresh()
        first.fresh()
        assert made == [True, False, False, False]

    def test_a_pickle_is_refused_unopened(self, model, benign, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("the pickle was executed",))

        for suffix in ("safetensors", "pt"):
            path = tmp_path / f"evil.{suffix}"
            torch.save({"x": Bomb()}, path)
            with pytest.raises(HoldfastError, match="is a pickle"):
                load_released("cnn", path, benign)
            with pytest.raises(HoldfastError, match="is a pickle"):
                load_released(str(path), None, benign)

    def test_the_refusal_of_foreign_weights_names_the_differences(self, benign, tmp_path):
        save_file({"body.0.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
        with pytest.raises(HoldfastError, match=r"does not fit cnn: no .*and \d+ more"):
            load_released("cnn", tmp_path / "w.safetensors", benign)
        with pytest.raises(HoldfastError, match="does not name its architecture"):
            load_released(str(tmp_path / "w.safetensors"), None, benign)

    def test_refused_options_are_refused_before_timm_sees_them(self, images, tmp_path, monkeypatch):
        """The header of a file of weights is untrusted."""
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
        spec = {"name": "timm:resnet18", "options": {"checkpoint_path": str(tmp_path / "evil.pt")}}
        save_tensors(tmp_path / "m.safetensors", {"x": torch.zeros(1)}, {"model": spec})
        with pytest.raises(HoldfastError, match="may be a pickle"):
            load_released(str(tmp_path / "m.safetensors"), None, images)

    @pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool])
    def test_integers_are_not_weights(self, model, benign, tmp_path, kind):
        state = contiguous(model)
        save_file({**state, "head.weight": state["head.weight"].to(kind)}, tmp_path / "w.safetensors")
        with pytest.raises(HoldfastError, match=f"'head.weight' holds {str(kind)[6:]}, and floating-point"):
            load_released("cnn", tmp_path / "w.safetensors", benign)

    def test_half_precision_is_weights(self, model, benign, tmp_path):
        state = {n: v.half() if v.is_floating_point() else v for n, v in contiguous(model).items()}
        save_file(state, tmp_path / "w.safetensors")
        assert next(load_released("cnn", tmp_path / "w.safetensors", benign).parameters()).dtype == torch.float32

    @pytest.mark.parametrize(
        "meta", ["[]", "3", "NaN", "[" * 100_000, '{"model": 3}', '{"model": [1]}', '{"model": {"nam": 1}}', "9" * 5000]
    )
    def test_a_hostile_header_is_a_clear_error(self, model, benign, tmp_path, meta):
        save_file(contiguous(model), tmp_path / "w.safetensors", metadata={"holdfast": meta})
        with pytest.raises(HoldfastError, match=r"not a readable|does not name|unusable description"):
            load_released(str(tmp_path / "w.safetensors"), None, benign)

    def test_missing_and_damaged_files(self, benign, tmp_path):
        with pytest.raises(HoldfastError, match="does not exist"):
            load_released("cnn", tmp_path / "no.safetensors", benign)
        (tmp_path / "noise.safetensors").write_bytes(b"\x00" * 64)
        with pytest.raises(HoldfastError, match="not a readable safetensors"):
            load_released("cnn", tmp_path / "noise.safetensors", benign)

    def test_an_architecture_alone_is_refused(self, benign):
        with pytest.raises(HoldfastError, match="architecture without weights"):
            load_released("cnn", None, benign)
        with pytest.raises(HoldfastError, match="did you mean 'cnn'"):
            load_released("cmn", None, benign)


class TestCatalog:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (ModelSpec(name="resnet"), "Unknown model 'resnet': did you mean 'cifar_resnet'"),
            (ModelSpec(name="timm:resnet19"), "Unknown timm model 'resnet19': did you mean 'resnet1"),
            (ModelSpec(name="cnn", options={"widht": 3}), "did you mean 'width'"),
            (ModelSpec(name="cnn", options={"width": "many"}), "cannot be built"),
            (ModelSpec(name="cifar_vgg", options={"depth": 12}), "expected one of 11, 13, 16, 19"),
            (ModelSpec(name="cifar_vit", options={"heads": 3}), "3 heads do not divide a width of 128"),
            (ModelSpec(name="small_caformer", options={"depths": [1, 1]}), "four numbers each"),
            (ModelSpec(name="cnn", options={"depth": -1}), "depth is -1; expected at least 1"),
            (ModelSpec(name="timm:resnet18", options={"nonsense": 1}), "cannot be created"),
            (ModelSpec(name="timm:resnet18", options={"act_layer": "nonsense"}), "KeyError 'nonsense'"),
            (ModelSpec(name="timm:resnet18", options={"output_stride": 7}), "cannot be created with .*AssertionError"),
            (ModelSpec(name="timm:resnet18", options={"layers": [1]}), "ZeroDivisionError"),
            (ModelSpec(name="timm:resnet18", options={"drop_rate": "a"}), "cannot "),
            (
                ModelSpec(name="timm:resnet18", options={"checkpoint_path": "x.pt"}),
                "'checkpoint_path' .*may be a pickle",
            ),
            (ModelSpec(name="timm:resnet18", options={"pretrained_cfg": {"file": "x.pt"}}), "'pretrained_cfg' would"),
            (ModelSpec(name="timm:resnet18", options={"pretrained_cfg_overlay": {"file": "x"}}), "_overlay' would"),
            (ModelSpec(name="timm:resnet18", options={"features_only": True}), "'features_only' leaves no head"),
        ],
    )
    def test_refusals(self, spec, message, images):
        with pytest.raises(HoldfastError, match=message):
            load_model(spec, images)

    def test_images_are_needed(self, toy):
        for name in ("cnn", "timm:resnet18"):
            with pytest.raises(HoldfastError, match="shape"):
                load_model(name, toy)
        assert load_model("mlp", toy).num_outputs == 3

    @pytest.mark.parametrize(
        ("name", "head"),
        [
            ("resnet18", "fc"),
            ("vgg11", "head.fc"),
            ("caformer_s18", "head.fc.fc2"),
            ("mobilenetv2_100", "classifier"),
            ("convnext_atto", "head.fc"),
            ("deit_tiny_patch16_224", "head"),
        ],
    )
    def test_timm_heads(self, name, head):
        from holdfast.models.families.timm import find_head

        with torch.device("meta"):
            model = timm.create_model(name, num_classes=5)
        assert find_head(name, model) == head
        assert model.get_submodule(head).out_features == 5

    def test_a_timm_model_without_a_head_is_refused(self, images):
        with pytest.raises(HoldfastError, match="no head was found"):
            load_model(ModelSpec(name="timm:resnet18", options={"num_classes": 0}), images)

    @pytest.mark.parametrize("name", ["timm:resnet18", "cifar_resnet"])
    def test_grey_images_get_one_channel(self, name, benign):
        model = load_model(ModelSpec(name=name), benign)
        assert model.network.conv1.in_channels == 1
        assert model.mean is not None
        assert model.mean.shape == (1, 1, 1)

    @pytest.mark.parametrize(
        ("name", "options", "weights", "task", "accuracy", "count"),
        [
            ("cifar_resnet", {"depth": 20}, "cifar10_resnet20", "cifar10", 0.9173, 600),
            ("cifar_resnet", {"depth": 32}, "cifar10_resnet32", "cifar10", 0.9263, 150),
            ("cifar_resnet", {"depth": 56}, "cifar10_resnet56", "cifar10", 0.9339, 150),
            ("cifar_vit", {}, "cifar10_vit", "cifar10", 0.7372, 600),
            ("mnist_cnn", {}, "mnist_cnn", "mnist", 0.9894, 600),
        ],
    )
    def test_real_weights(self, data_dir, name, options, weights, task, accuracy, count):
        """Published accuracies of the full test splits, within three standard errors of so many images.

        Of the three depths, one is measured closely.
        """
        task = load_task(TaskSpec(data=task, test_limit=count), data_dir=data_dir)
        spec = ModelSpec(name=name, options=options, weights=f"weights/{weights}.safetensors")
        tolerance = 3 * (accuracy * (1 - accuracy) / count) ** 0.5
        assert task.score(load_model(spec, task, data_dir=data_dir)) == pytest.approx(accuracy, abs=tolerance)

    @pytest.mark.parametrize(
        ("name", "size", "message"),
        [
            ("mnist_cnn", 12, "are too small for its convolutions; give at least 16x16"),
            ("cifar_vit", 30, "not a whole number of 4x4 patches"),
            ("cifar_vgg", 16, "give at least 32x32"),
        ],
    )
    def test_images_that_a_network_cannot_take(self, name, size, message):
        with pytest.raises(HoldfastError, match=message):
            load_model(name, load_task(f"digits@image_size={size}"))

    def test_the_transformer_is_pytorchs(self):
        """The same tensors in PyTorch's own encoder give the same outputs."""
        model = load_model(ModelSpec(name="cifar_vit", options={"depth": 2}), load_task("digits@image_size=16"))
        layer = nn.TransformerEncoderLayer(128, 8, 256, batch_first=True)
        theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        theirs.load_state_dict(model.network.transformer.state_dict(), strict=True)
        tokens = torch.randn(3, 17, 128)
        ours = model.eval().network.transformer["layers"](tokens)
        assert torch.allclose(ours, theirs(tokens), atol=1e-5)


class TestFit:
    def test_no_trainable_parameters(self, model, benign):
        model.requires_grad_(False)
        with pytest.raises(HoldfastError, match="no trainable parameters"):
            check_fits(model, benign, own_task=True)
        check_fits(model, benign, own_task=True, trainable=False)

    def test_the_check_leaves_the_model_and_the_random_numbers_alone(self, benign):
        class Restless(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(1))
                self.out = nn.Linear(64, 5)

            def forward(self, x):
                self.calls += 1
                return self.out(x.flatten(1) + torch.rand(64))

        model = SplitModel(Restless(), "out")
        digest, state = model.facts().sha256, torch.get_rng_state()
        check_fits(model, benign, own_task=True)
        assert model.facts().sha256 == digest
        assert torch.equal(torch.get_rng_state(), state)

    def test_wrong_input_shape(self, model, images):
        with pytest.raises(HoldfastError, match=r"shape \(3, 32, 32\).*image_size"):
            check_fits(model, images, own_task=True)

    def test_class_count(self, model):
        with pytest.raises(HoldfastError, match="5 outputs and its task 'digits' 10 classes"):
            check_fits(model, load_task("digits"), own_task=True)
        check_fits(model, load_task("digits"), own_task=False)

    def test_outputs_not_finite(self, model, benign):
        with torch.no_grad():
            model.head.weight.fill_(float("inf"))
        with pytest.raises(HoldfastError, match="not finite"):
            check_fits(model, benign, own_task=True)

    def test_outputs_that_the_head_does_not_explain(self, benign):
        class Doubled(nn.Module):
            def __init__(self):
                super().__init__()
                self.out = nn.Linear(64, 5)

            def forward(self, x):
                z = self.out(x.flatten(1))
                return torch.cat([z, z], -1)

        with pytest.raises(HoldfastError, match=r"returns \(2, 10\)"):
            check_fits(SplitModel(Doubled(), "out"), benign, own_task=True)


def test_kept_outputs_of_a_head_for_more_classes(tmp_path):
    """An ImageNet classifier keeps ten of its classes, without a new head."""
    wide, narrow = load_task("digits"), load_task("digits[3,5,8]")
    torch.manual_seed(0)
    whole = load_model("cnn", wide).eval()
    whole.save(tmp_path / "w.safetensors")
    spec = ModelSpec(name="cnn", weights=str(tmp_path / "w.safetensors"), keep_outputs=(3, 5, 8))
    part = load_model(spec, narrow).eval()
    x = next(narrow.sweep("test", 20, device=torch.device("cpu"))).x
    assert torch.allclose(part(x), whole(x)[:, [3, 5, 8]], atol=1e-6)
    part.save(tmp_path / "part.safetensors")
    again = load_model(str(tmp_path / "part.safetensors"), narrow).eval()
    assert torch.equal(again(x), part(x))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [((3, 5), "names 2 different ones"), ((3, 3, 5), "names 2 different"), ((3, 5, 10), "no output 10")],
)
def test_kept_outputs_that_cannot_be(tmp_path, outputs, message):
    load_model("cnn", load_task("digits")).save(tmp_path / "w.safetensors")
    spec = ModelSpec(name="cnn", weights=str(tmp_path / "w.safetensors"), keep_outputs=outputs)
    with pytest.raises(HoldfastError, match=message):
        load_model(spec, load_task("digits[3,5,8]"))


def test_kept_outputs_without_weights_to_choose_from():
    with pytest.raises(HoldfastError, match="keep_outputs chooses among"):
        load_model(ModelSpec(name="cnn", keep_outputs=(0, 1, 2)), load_task("digits[3,5,8]"))
