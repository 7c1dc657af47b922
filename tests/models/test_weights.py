"""Files of weights: one or several, with other names, and files that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, SplitModel, load_model, load_released
from holdfast.models.weights import read_weights
from holdfast.runtime.storage import load_tensors


@pytest.fixture(scope="module")
def state(benign):
    """Weights of a `cnn`."""
    torch.manual_seed(3)
    return {n: v.contiguous() for n, v in load_model("cnn", benign).network.state_dict().items()}


def loaded(folder, tensors, benign, name="w.safetensors"):
    save_file({n: v.clone() for n, v in tensors.items()}, folder / name)
    return load_released("cnn", folder / name, benign)


class TestNames:
    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module.", "network.", "backbone."]
    )
    def test_known_prefixes(self, state, benign, tmp_path, prefix):
        model = loaded(tmp_path, {prefix + n: v for n, v in state.items()}, benign)
        assert torch.equal(model.head.weight, state["head.weight"])
        assert model.notes == (f"The names in the weights begin with {prefix!r}, which was left out.",)

    def test_wrappers_in_the_middle(self, state, benign, tmp_path):
        renamed = {n.replace("body.", "body.module."): v for n, v in state.items()}
        model = loaded(tmp_path, renamed, benign)
        assert torch.equal(model.network.state_dict()["body.0.weight"], state["body.0.weight"])

    def test_a_prefix_that_only_the_network_has(self, benign, tmp_path):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

            def forward(self, x):
                return self.model(x)

        save_file({"1.weight": torch.ones(5, 64), "1.bias": torch.ones(5)}, tmp_path / "w.safetensors")
        model = SplitModel(Net(), "model.1")
        model.load(str(tmp_path / "w.safetensors"))
        assert torch.equal(model.head.bias, torch.ones(5))
        assert "lack 'model.' at their beginning" in model.notes[0]

    def test_other_prefixes_are_not_guessed(self, state, benign, tmp_path):
        with pytest.raises(HoldfastError, match="does not fit cnn"):
            loaded(tmp_path, {f"student.{n}": v for n, v in state.items()}, benign)
        some = {("module." if n.startswith("body") else "") + n: v for n, v in state.items()}
        some |= {"teacher.weight": torch.zeros(1)}
        with pytest.raises(HoldfastError, match="does not fit cnn"):
            loaded(tmp_path, some, benign)

    def test_tied_weights_and_old_counters(self, state, benign, tmp_path):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5))
        network[2].weight = network[1].weight
        kept = {n: torch.full_like(v, 2) for n, v in network.state_dict().items() if n != "2.weight"}
        save_file(kept, tmp_path / "tied.safetensors")
        model = SplitModel(network, "3")
        model.load(tmp_path / "tied.safetensors")
        assert model.network[2].weight is model.network[1].weight
        assert torch.equal(model.network[2].weight, torch.full((64, 64), 2.0))
        assert "(tied weights)" in model.notes[0]
        old = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
        assert len(old) < len(state)
        assert torch.equal(loaded(tmp_path, old, benign).head.weight, state["head.weight"])

    def test_an_averaged_model(self, state, benign, tmp_path):
        averaged = {"n_averaged": torch.tensor(7), **{f"module.{n}": v for n, v in state.items()}}
        assert torch.equal(loaded(tmp_path, averaged, benign).head.weight, state["head.weight"])

    def test_both_sides_are_shown(self, benign, tmp_path):
        save_file({f"layers.{i}.weight": torch.zeros(2, 2) for i in range(9)}, tmp_path / "w.safetensors")
        with pytest.raises(HoldfastError) as caught:
            load_released("cnn", tmp_path / "w.safetensors", benign)
        assert "of which the file lacks: body.0.weight, body.1.weight" in str(caught.value)
        assert "the file has 9, 9 of which the model lacks: layers.0.weight, layers.1.weight" in str(caught.value)

    def test_shapes_are_shown(self, state, benign, tmp_path):
        with pytest.raises(HoldfastError, match=r"'head.bias' is \(7,\) instead of \(5,\)"):
            loaded(tmp_path, {**state, "head.bias": torch.zeros(7)}, benign)


class TestSeveralFiles:
    @pytest.fixture
    def shards(self, state, tmp_path):
        names, files = list(state), [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        for i, file in enumerate(files):
            save_file({n: state[n] for n in names[i::3]}, tmp_path / file)
        index = {"weight_map": {n: files[i % 3] for i, n in enumerate(names)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    @pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of-00003.safetensors"])
    def test_all_are_read(self, shards, state, benign, name):
        model = load_released("cnn", shards / name, benign)
        assert all(torch.equal(v, state[n]) for n, v in model.network.state_dict().items())
        assert model.notes == ("The weights were read from 3 files.",)

    @pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of-00003.safetensors"])
    def test_one_that_is_missing_is_named(self, shards, benign, name):
        (shards / "model-00003-of-00003.safetensors").unlink()
        with pytest.raises(HoldfastError, match=r"3 files, but 'model-00003-of-00003.safetensors' is not"):
            load_released("cnn", shards / name, benign)

    def test_an_index_that_lies(self, shards, benign):
        path = shards / "model.safetensors.index.json"
        said = json.loads(path.read_text())
        said["weight_map"]["extra.weight"] = "model-00001-of-00003.safetensors"
        path.write_text(json.dumps(said))
        with pytest.raises(HoldfastError, match=r"has no 'extra\.weight', which the index says"):
            read_weights(path)
        said["weight_map"]["extra.weight"] = "../secret.safetensors"
        path.write_text(json.dumps(said))
        with pytest.raises(HoldfastError, match=r"names '\.\./secret\.safetensors'; expected"):
            read_weights(path)
        for text in ("[]", "{}", '{"weight_map": 3}', "{", '{"weight_map": {}}'):
            path.write_text(text)
            with pytest.raises(HoldfastError, match=r"not an index of weights|names 'no file'"):
                read_weights(path)


class TestWhatIsNoSafetensors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"it is empty \(0 bytes\)"),
            (b'{"weight_map": {}}' * 9, "it is JSON"),
            (b"<!DOCTYPE html><html>not found</html>", "it is a web page"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
                "it is a Git LFS pointer.*lfs pull",
            ),
            (b"GGUF" + bytes(60), "it is GGUF"),
            (b"\x89HDF\r\n" + bytes(60), "it is HDF5"),
            (b"\x1f\x8b" + bytes(60), "compressed"),
            (b"PK\x03\x04" + bytes(60), "is a pickle"),
        ],
    )
    def test_a_file_is_refused_by_its_kind(self, benign, tmp_path, content, message):
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(HoldfastError, match=message):
            load_released("cnn", tmp_path / "w.safetensors", benign)

    def test_half_a_file(self, state, benign, tmp_path):
        save_file(state, tmp_path / "w.safetensors")
        whole = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(HoldfastError, match="the file ends too early"):
            load_released("cnn", tmp_path / "w.safetensors", benign)

    @pytest.mark.parametrize("beginning", [b"{", b"<", b"\x80\x02", b"\x80\x05"])
    def test_a_good_file_may_begin_like_another_format(self, tmp_path, beginning):
        """The first bytes are the header's length; that of a small network may be 0x0280, the beginning of a pickle."""
        names = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        length = next(n for n in range(len(names), 2000) if n.to_bytes(8, "little").startswith(beginning))
        content = length.to_bytes(8, "little") + names.ljust(length) + bytes(4)
        (tmp_path / "w.safetensors").write_bytes(content)
        tensors, _ = load_tensors(tmp_path / "w.safetensors")
        assert tensors["x"].tolist() == [0.0]


class TestOptionsThatWouldDoNothing:
    def test_weights_beside_a_file_that_names_its_architecture(self, benign, tmp_path):
        load_model("cnn", benign).save(tmp_path / "m.safetensors")
        for other in (tmp_path / "m.safetensors", tmp_path / "none.safetensors"):
            with pytest.raises(HoldfastError, match=r"names its architecture \(cnn\), and the weights .* beside it"):
                load_released(str(tmp_path / "m.safetensors"), other, benign)

    def test_mean_alone(self, benign):
        with pytest.raises(HoldfastError, match="--mean and --std together"):
            load_released("cnn", None, benign, mean=(0.5,))

    def test_pretrained_beside_weights(self, benign, tmp_path):
        spec = ModelSpec(name="timm:resnet18", weights="w.safetensors", options={"pretrained": True})
        save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
        with pytest.raises(HoldfastError, match="`pretrained` would load others"):
            load_model(spec, benign, data_dir=tmp_path)

    def test_a_normalisation_of_other_channels(self, benign):
        with pytest.raises(HoldfastError, match=r"mean of the input normalisation has 3 values.*\(1, 8, 8\)"):
            load_model(ModelSpec(name="cnn", mean=(0.1, 0.2, 0.3), std=(1, 1, 1)), benign)


class TestSaving:
    def test_text_and_missing_folders(self, benign, tmp_path):
        model = load_model("cnn", benign)
        assert model.save(f"{tmp_path}/a/b/m.safetensors") == model.save(tmp_path / "c" / "m.safetensors")
        model.load(f"{tmp_path}/a/b/m.safetensors")
        with pytest.raises(HoldfastError, match=r"is a folder; name the file in it, such as .*m?odel.safetensors"):
            model.save(tmp_path)

    def test_export_of_a_denoiser(self, denoiser, tmp_path):
        assert denoiser.save_pretrained(f"{tmp_path}/x/y") == tmp_path / "x" / "y"
        assert (tmp_path / "x" / "y" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("nets.py", ["nets.py"], "name the function in it"),
        ("folder", ["folder/config.json"], "name it hf:folder"),
        ("folder", ["folder/adapter_config.json"], "name it hf:folder"),
        ("folder", ["folder/model.safetensors"], "name the file in it: folder/model.safetensors"),
        ("folder", ["folder/notes.txt"], "it holds no model"),
        ("config.json", ["config.json"], "name the architecture"),
        ("model.safetensors.index.json", [], "name the architecture"),
        ("timn:resnet18", [], "did you mean timm:resnet18"),
        ("HF:some/model", [], "did you mean hf:some/model"),
        ("difusers:some/model", [], "did you mean diffusers:some/model"),
    ],
)
def test_names_that_are_not_of_models(benign, tmp_path, monkeypatch, name, files, message):
    monkeypatch.chdir(tmp_path)
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(HoldfastError, match=message):
        load_released(name, None, benign)
