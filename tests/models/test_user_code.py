"""Networks from the user's functions: their hash, their normalisation, and refusals."""

from __future__ import annotations

import sys

import pytest
import torch

from holdfast.cli import main
from holdfast.errors import HoldfastError
from holdfast.models import ModelSpec, load_model, load_released
from holdfast.models.families import source_files
from holdfast.tasks import TaskSpec, load_task

HEADER = """
import torch
from torch import nn


def net(classes=5, pixels=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))

"""


@pytest.fixture
def write(tmp_path):
    """Writes files, and afterwards removes their modules from `sys.modules`."""
    before = set(sys.modules)

    def written(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)
        return tmp_path

    yield written
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "") or ""):
            del sys.modules[name]


def names(folder, file="nets.py", module=None):
    return sorted(source_files.files(folder / file, module or str(folder / file)))


class TestSources:
    def test_direct_and_indirect_imports_are_followed(self, write):
        folder = write(
            nets="import torch, helper\nfrom parts import blocks\ndef f():\n    import late\n",
            helper="from deeper.sizes import WIDTH\n",
            late="__import__('named')\nimport importlib\nimportlib.import_module('other.thing')\n",
            named="", other__thing="", deeper____init__="", deeper__sizes="from . import more\n", deeper__more="",
            parts__blocks="from .norms import x\n", parts__norms="", parts__unused="", unused="",
        )  # fmt: skip
        (folder / "deeper" / "__init__.py").write_text("")
        assert names(folder) == [
            "deeper/__init__.py", "deeper/more.py", "deeper/sizes.py", "helper.py", "late.py", "named.py", "nets.py",
            "other/thing.py", "parts/blocks.py", "parts/norms.py",
        ]  # fmt: skip

    def test_a_module_of_a_package(self, write):
        folder = write(
            mine__sub__nets="from ..common import x\nimport beside\n", mine__common="", mine__sub__other="", beside=""
        )
        for package in ("mine", "mine/sub"):
            (folder / package / "__init__.py").write_text("")
        assert names(folder, "mine/sub/nets.py", "mine.sub.nets") == [
            "beside.py", "mine/__init__.py", "mine/common.py", "mine/sub/__init__.py", "mine/sub/nets.py",
        ]  # fmt: skip

    def test_circles_and_files_that_cannot_be_read(self, write):
        folder = write(nets="import helper", helper="import nets\nimport bad", bad="1 +")
        assert names(folder) == ["bad.py", "helper.py", "nets.py"]

    def test_installed_packages_are_not_followed(self, write):
        folder = write(nets="import numpy, torch.nn, holdfast.models\n")
        assert names(folder) == ["nets.py"]

    def test_the_hash_is_the_same_elsewhere(self, write, tmp_path):
        hashes = set()
        for place in ("one", "two"):
            write(**{f"{place}__nets": "import helper", f"{place}__helper": "x = 1"})
            hashes.add(source_files.sha256(tmp_path / place / "nets.py", str(tmp_path / place / "nets.py")))
        assert len(hashes) == 1


def test_a_helper_that_changed_makes_another_job(write, benign, tmp_path, capsys):
    """Stands for a second process: the module is removed and imported again."""
    folder = write(
        nets=HEADER + "import helper\ndef make():\n    torch.manual_seed(0)\n    return net()\n", helper="x = 1"
    )
    command = [
        "feasibility", f"{folder}/nets.py:make", "--benign", "digits[0-4]", "--restricted", "digits[5-9]", "--out",
        str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip

    def run():
        with pytest.raises(SystemExit) as done:
            main.main(command)
        return done.value.code

    assert run() == 0
    assert run() == 0
    (folder / "helper.py").write_text("x = 2")
    assert run() == 2
    assert "was changed after this process imported it" in capsys.readouterr().err
    from holdfast.models.families import user_code

    user_code._IMPORTED.clear()
    assert run() == 2
    assert "holds another job; it differs in: model" in capsys.readouterr().err


class TestNormalisation:
    MADE = HEADER + (
        "def bare(): return net()\n"
        "def timmlike():\n    made = net(pixels=192)\n"
        "    made.default_cfg = {'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.5, 0.5)}\n"
        "    return made\n"
        "def split():\n    from holdfast import SplitModel\n    return SplitModel(net(), '1', mean=[0.25], std=[0.5])\n"
    )

    def test_a_note_names_the_normalisation(self, write, benign):
        folder = write(nets=self.MADE)
        colour = load_task(TaskSpec(data="digits[0-4]", channels=3))
        bare = load_model(f"{folder}/nets.py:bare", benign)
        assert bare.mean is None
        assert "gets images in [0, 1] without normalisation" in bare.notes[-1]
        said = load_model(f"{folder}/nets.py:timmlike", colour)
        assert said.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert "mean [0.1, 0.2, 0.3], std [0.5, 0.5, 0.5]" in said.notes[-1]
        split = load_model(f"{folder}/nets.py:split", benign)
        assert split.std.flatten().tolist() == [0.5]
        given = load_released(f"{folder}/nets.py:bare", None, benign, mean=(0.5,), std=(0.25,))
        assert given.mean.flatten().tolist() == [0.5]
        assert "that were given" in given.notes[-1]
        x = torch.rand(2, 1, 8, 8)
        assert torch.allclose(given(x), given.network((x - 0.5) / 0.25))

    def test_of_other_channels(self, write, benign):
        folder = write(nets=self.MADE)
        with pytest.raises(HoldfastError, match=r"mean of the input normalisation has 3 values.*one a channel"):
            load_released(f"{folder}/nets.py:bare", None, benign, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))

    @pytest.mark.parametrize(("mean", "std"), [("0.5", None), ("a,b", "1"), ("0.5", "0"), ("nan", "1")])
    def test_on_the_command_line(self, write, benign, tmp_path, capsys, mean, std):
        folder = write(nets=self.MADE)
        command = ["immunize", f"{folder}/nets.py:bare", "--benign", "digits[0-4]", "--restricted", "digits[5-9]"]
        more = ["--mean", mean, *([] if std is None else ["--std", std])]
        with pytest.raises(SystemExit) as done:
            main.main([*command, "--out", str(tmp_path / "out"), *more])
        assert done.value.code == 2
        assert "unexpected" not in capsys.readouterr().err


class TestWhatIsReturned:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("return nn.Linear", "returned the class Linear.*an object of the class"),
            ("net()", "returned NoneType.*Is there a `return`"),
            ("return net().state_dict()", "returned OrderedDict.*state dict.*--weights FILE"),
            ("return net(), 3", "returned tuple.*only the network in it"),
            ("return {'model': net()}", "returned dict.*only the network in it"),
            ("return [1]", "returned list; expected a torch.nn.Module.$"),
            ("import sys; sys.exit(0)", "ended the program"),
            ("return net().to('meta')", "no values"),
            ("return net(3)", "has 3 outputs and its task"),
            ("return net(pixels=27)", r"cannot take inputs of shape \(1, 8, 8\)"),
            ("made = net(); made[1].weight.data.fill_(float('nan')); return made", "not finite"),
        ],
    )
    def test_returned_objects_that_are_not_networks(self, write, benign, body, message):
        folder = write(nets=f"{HEADER}def make():\n    {body}\n")
        with pytest.raises(HoldfastError, match=message):
            load_model(f"{folder}/nets.py:make", benign)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("import sys\nsys.exit(0)", "ends the program when it is imported"),
            ("import argparse\nargparse.ArgumentParser().parse_args(['--no'])", "ends the program when it is imported"),
            ("from . import other", "relative import.*package.module:function"),
            ("def make(:", "SyntaxError"),
            ("raise RuntimeError('later')", "RuntimeError: later"),
        ],
    )
    def test_files_that_do_not_import(self, write, benign, text, message):
        folder = write(nets=text)
        with pytest.raises(HoldfastError, match=message):
            load_model(f"{folder}/nets.py:make", benign)

    def test_settings_that_code_leaves_behind(self, write, benign):
        settings = "import torch\ntorch.set_grad_enabled(False)\n"
        function = "def make():\n    torch.set_default_dtype(torch.float64)\n    return net().requires_grad_(False)\n"
        folder = write(nets=settings + HEADER + function)
        model = load_model(f"{folder}/nets.py:make", benign)
        assert torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32
        assert model.dtype == torch.float64

    def test_a_half_network_is_attacked_in_float32(self, write, benign):
        folder = write(nets=f"{HEADER}def make():\n    return net().half()\n")
        model = load_model(f"{folder}/nets.py:make", benign)
        assert model.dtype == model.fresh().dtype == torch.float32
        assert "stored in float16" in model.notes[0]


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("feasibility", ["--head", "fc"], "--head needs a MODEL"),
        ("feasibility", ["--mean", "0.5"], "--mean needs a MODEL"),
        ("audit", ["cnn.safetensors", "--original", "cnn.safetensors", "--trials", "9"], "quick-v1 is not a search"),
    ],
)
def test_options_without_effect(tmp_path, monkeypatch, capsys, benign, verb, options, message):
    monkeypatch.chdir(tmp_path)
    load_model(ModelSpec(name="cnn"), benign).save("cnn.safetensors")
    where = ["--benign", "digits[0-4]", "--restricted", "digits[5-9]", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as done:
        main.main([verb, *options, *where])
    assert done.value.code == 2
    assert message in capsys.readouterr().err
