"""Odd inputs that people really have, through the command line: refused with one message, or read as their owner means.

Every case is one row: what is typed, the exit code, and words that the answer must hold. Whatever the case, the answer
is no traceback, and no message that says "unexpected".
"""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from holdfast.cli.main import main

RNG = np.random.default_rng(0)
FEATURES = "feasibility --benign {benign} --restricted {restricted} --out {out}"


def picture(path, label, *, mode="RGB", size=8, **more):
    """A grey image with some noise, so that classes differ and no two images are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(60 * (label + 1) + RNG.normal(0, 20, (size, size, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if "A" in mode:
        image.putalpha(100)
    image.save(path, **more)


def folder(root, classes=("cat", "dog"), count=8, suffix=".png", **more):
    for label, name in enumerate(classes):
        for i in range(count):
            picture(root / name / f"{i}{suffix}", label, **more)
    return root


def split_folder(root, train="train", test="test", classes=("cat", "dog")):
    folder(root / train, classes)
    folder(root / test, classes, count=4)
    return root


def arrays(path, *, x=None, y=None, **more):
    """40 images of 6 by 6 pixels in two classes; what is given replaces them."""
    images = {s: RNG.integers(0, 255, (n, 6, 6), dtype=np.uint8) for s, n in (("train", 40), ("test", 20))}
    made = {f"x_{s}": a if x is None else x(a) for s, a in images.items()}
    made |= {f"y_{s}": np.arange(len(a)) % 2 if y is None else y(np.arange(len(a)) % 2) for s, a in images.items()}
    np.savez(path, **{**made, **more})


def table(path, header="a,b,label", rows=None, *, ending="\n", encoding="utf-8"):
    made = [f"{i / 7:.3f},{i % 5},{'xy'[i % 2]}" for i in range(40)] if rows is None else rows
    path.write_bytes(ending.join([header, *made, ""]).encode(encoding))


@pytest.fixture(scope="module")
def world(tmp_path_factory, trained):
    """Files of every kind in one folder, which is the current one, and a data folder beside it."""
    here = tmp_path_factory.mktemp("odd")
    (here / "data").mkdir()

    # images
    folder(here / "plain")
    folder(here / "other", ("car", "bus"))
    folder(here / "nested")
    picture(here / "nested/cat/more/deep/9.png", 0)
    folder(here / "formats", suffix=".ppm")
    folder(here / "capitals", suffix=".PNG")
    folder(here / "jpeg", suffix=".jpeg")
    folder(here / "mac")
    picture(here / "mac/__MACOSX/._0.png", 0)
    (here / "mac/.DS_Store").write_bytes(b"x")
    folder(here / "notes")
    (here / "notes/cat/readme.txt").write_text("not an image")
    folder(here / "empty_class")
    (here / "empty_class/fox").mkdir()
    folder(here / "clear", mode="RGBA")
    folder(here / "greyclear", mode="LA")
    folder(here / "palette", mode="P")
    folder(here / "cmyk", mode="CMYK", suffix=".jpg")
    folder(here / "bits", mode="1")
    for label, name in enumerate(("cat", "dog")):
        for i in range(8):
            (here / "twelve" / name).mkdir(parents=True, exist_ok=True)
            deep = (RNG.integers(0, 4096, (8, 8)) // (label + 1)).astype(np.uint16)
            Image.fromarray(deep).save(here / f"twelve/{name}/{i}.png")
    folder(here / "turned")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(8):
        picture(here / f"turned/dog/{i}.jpg", 1, exif=exif)
    folder(here / "broken")
    (here / "broken/cat/9.png").write_bytes((here / "broken/cat/0.png").read_bytes()[:60])
    folder(here / "zero")
    (here / "zero/cat/9.png").write_bytes(b"")
    folder(here / "sizes")
    picture(here / "sizes/cat/9.png", 0, size=9)
    folder(here / "sizes2", size=9)
    split_folder(here / "splits")
    split_folder(here / "testing", "train", "testing")
    split_folder(here / "upper", "Train", "Test")
    split_folder(here / "dev", "train", "dev")
    split_folder(here / "lone", "train", "test")
    folder(here / "lone/test", ("zebra",), count=3)
    folder(here / "numbers", tuple(map(str, range(12))), count=4)
    folder(here / "at@home")
    folder(here / "br[0-1]")
    folder(here / "späte ß")
    folder(here / "one", ("cat",))
    (here / "void").mkdir()
    (here / "flat").mkdir()
    picture(here / "flat/0.png", 0)
    split_folder(here / "leak")
    for i in range(4):
        (here / f"leak/test/cat/{i}.png").write_bytes((here / f"leak/train/cat/{i}.png").read_bytes())
    (here / "loop/cat").mkdir(parents=True)
    folder(here / "loop")
    (here / "loop/cat/again").symlink_to(here / "loop")

    # arrays
    arrays(here / "ok.npz")
    arrays(here / "other.npz")
    arrays(here / "data/both.npz")
    arrays(here / "both.npz")
    arrays(here / "data/named.npz")
    arrays(here / "floats.npz", x=lambda a: a / 255)
    arrays(here / "wide.npz", x=lambda a: a.astype(np.int64))
    arrays(here / "first.npz", x=lambda a: np.repeat(a[:, None], 3, 1))
    arrays(here / "four.npz", x=lambda a: np.repeat(a[..., None], 4, -1))
    arrays(here / "from1.npz", y=lambda y: y + 1)
    arrays(here / "minus.npz", y=lambda y: np.where(np.arange(len(y)) == 3, -1, y))
    arrays(here / "onehot.npz", y=lambda y: np.eye(2)[y])
    arrays(here / "column.npz", y=lambda y: y[:, None])
    arrays(here / "words.npz", y=lambda y: np.array(["cat", "dog"])[y])
    arrays(here / "nanlabel.npz", y=lambda y: np.where(np.arange(len(y)) == 3, np.nan, y))
    arrays(here / "gap.npz", y=lambda y: y * 2)
    arrays(here / "unseen.npz", y_test=np.array([0, 1, 2] + [0] * 17))
    arrays(here / "huge.npz", y=lambda y: y * 10**9)
    arrays(here / "infinite.npz", x=lambda a: np.where(a > 250, np.inf, a).reshape(len(a), -1))
    arrays(here / "pickled.npz", extra=np.array([{}], dtype=object), x=lambda a: a.astype(object))
    arrays(here / "short.npz", y_train=np.zeros(3, int))
    arrays(here / "names.npz", class_names=np.array(["a"]))
    (here / "text.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (here / "zero.npz").write_bytes(b"")

    # tables
    table(here / "ok.csv")
    table(here / "other.csv", rows=[f"{i / 3:.3f},{i % 4},{'pq'[i % 2]}" for i in range(40)])
    table(here / "semicolon.csv", "a;b;label", [f"{i / 7:.3f};{i % 5};{'xy'[i % 2]}" for i in range(40)])
    table(here / "bom.csv", encoding="utf-8-sig")
    table(here / "windows.csv", ending="\r\n")
    table(here / "latin.csv", "a,b,größe", encoding="latin-1")
    table(here / "twice.csv", "a,a,label")
    table(here / "blank.csv", " a , b , label ")
    table(here / "cells.csv", rows=[f"{i / 7:.3f},{i % 5},{('x', ' x', 'y', 'y ')[i % 4]}" for i in range(40)])
    table(here / "hole.csv", rows=[f"{i / 7:.3f},{i % 5 if i != 4 else ''},{'xy'[i % 2]}" for i in range(40)])
    table(here / "header.csv", rows=[])
    table(here / "once.csv", rows=[f"{i / 7:.3f},{i % 5},{'xyz'[2 if i == 7 else i % 2]}" for i in range(40)])
    (here / "zero.csv").write_bytes(b"")
    split = [f"{i / 7:.3f},{i % 5},{'xy'[i % 2]},{('train', 'train', 'train', 'test')[i // 2 % 4]}" for i in range(40)]
    table(here / "split.csv", "a,b,label,split", split)
    table(here / "valid.csv", "a,b,label,split", [row.replace("test", "validation") for row in split])
    table(here / "dots.csv", "a,b,label,split", [r.replace(",x,test", ",x.,test") for r in split])

    # models and weights
    trained.save(here / "model.safetensors")
    weights = load_file(here / "model.safetensors")
    save_file({f"module.{n}": t for n, t in weights.items()}, here / "parallel.safetensors")
    save_file({f"_orig_mod.{n}": t for n, t in weights.items()}, here / "compiled.safetensors")
    save_file({f"zz.{n}1": t for n, t in weights.items()}, here / "foreign.safetensors")
    save_file({n: t.half() for n, t in weights.items()}, here / "half.safetensors")
    save_file({n: t * torch.nan for n, t in weights.items()}, here / "nan.safetensors")
    save_file({n: t[None].contiguous() for n, t in weights.items()}, here / "narrow.safetensors")
    (here / "cut.safetensors").write_bytes((here / "model.safetensors").read_bytes()[:500])
    (here / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    torch.save(weights, here / "model.pt")
    (here / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def good(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
        "def half(): return good().half()\n"
        "def nothing(): pass\n"
        "def state(): return good().state_dict()\n"
        "def fails(): raise RuntimeError('weights not found')\n"
        "def wants(width): return good()\n"
        "def small(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
        "def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(99, 5))\n"
        "def meta():\n    with torch.device('meta'):\n        return good()\n"
        "def parallel(): return nn.DataParallel(good())\n"
        "def compiled(): return torch.compile(good())\n"
        "def scripted(): return torch.jit.script(good())\n"
        "value = 3\n"
    )
    (here / "syntax.py").write_text("def net(:\n")

    # recipes
    recipe = "title: t\nmodel: {name: cnn}\npretrain: {steps: 2}\nbenign: {data: 'digits[0-4]'}\n"
    recipe += "restricted: {data: 'digits[5-9]'}\ndefense: {name: sophon}\n"
    (here / "twice.yaml").write_text(recipe + "audit: {seeds: 2}\naudit: {seeds: 3}\n")
    (here / "inner.yaml").write_text(recipe + "audit:\n  seeds: 2\n  seeds: 20\n")
    (here / "tab.yaml").write_text(recipe + "audit:\n\tseeds: 2\n")
    (here / "two.yaml").write_text(recipe + "---\n" + recipe)
    (here / "empty.yaml").write_text("")
    (here / "list.yaml").write_text("- a\n- b\n")
    (here / "code.yaml").write_text(recipe.replace("cnn", "nets.py:good"))
    (here / "python.yaml").write_text("title: !!python/object/apply:os.getcwd []\n")
    (here / "latin.yaml").write_bytes("title: größe\n".encode("latin-1"))
    (here / "noweights.yaml").write_text(recipe.replace("pretrain: {steps: 2}\n", ""))
    (here / "afile").write_text("x")
    return here


def images(name):
    return f"feasibility --benign {name} --restricted other/@image_size=8 --out {{out}}"


def npz(name):
    return f"feasibility --benign {name} --restricted ./other.npz --out {{out}}"


def csv(name, target="label"):
    return f"feasibility --benign {name}@target={target} --restricted ./other.csv@target=label --out {{out}}"


def audit(model="model.safetensors", more="", original="model.safetensors"):
    return (
        f"audit {model} --original {original} --benign digits[0-4] --restricted digits[5-9] --out {{out}} "
        f"--budgets 0,1 --seeds 1 --shots 2 {more}"
    )


def immunize(model="model.safetensors", more="", benign="digits[0-4]", restricted="digits[5-9]"):
    return (
        f"immunize {model} --benign {benign} --restricted {restricted} --out {{out}} --defense sophon "
        f"--set iterations=1 {more}"
    )


# What is typed, and words that the answer must hold, in any letter case.
READ = {
    "class folders": (images("plain/"), ["cat", "dog"]),
    "nested folders": (images("nested/"), ["17"]),
    "ppm": (images("formats/"), []),
    "capital suffix": (images("capitals/"), []),
    "jpeg": (images("jpeg/"), []),
    "an archive's leftovers": (images("mac/"), ["__MACOSX"]),
    "a text beside the images": (images("notes/"), [".txt"]),
    "an empty class folder": (images("empty_class/"), ["fox"]),
    "transparent": (images("clear/"), ["transparen", "white"]),
    "transparent grey": (images("greyclear/"), ["transparen", "white"]),
    "twelve bits": (images("twelve/"), ["12 bits"]),
    "palette": (images("palette/"), []),
    "cmyk": (images("cmyk/"), []),
    "one bit": (images("bits/"), []),
    "turned by EXIF": (images("turned/"), ["EXIF"]),
    "other sizes with image_size": (images("sizes/@image_size=8"), []),
    "train and test": (images("splits/"), []),
    "dev is for testing": (images("dev/"), ["dev"]),
    "train beside testing": (images("testing/"), ["16 training and 8 test samples"]),
    "numbers as folders": (images("numbers/[0-2]"), ["0", "1", "2"]),
    "at in a path": (images("at@home/"), []),
    "brackets in a path": (images("'br[0-1]/'"), ["from folder br[0-1]: 12 training and 4 test samples"]),
    "blanks and umlauts": (images("'späte ß/'"), []),
    "a loop of links": (images("loop/"), []),
    "test images in training": (images("leak/"), ["4 of 8 test samples", "among the training samples"]),
    "an archive": (npz("./ok.npz"), []),
    "an archive of the data folder": (npz("named") + " --data-dir data", []),
    "a table": (csv("ok.csv"), []),
    "byte order mark": (csv("bom.csv"), []),
    "semicolons": (csv("semicolon.csv"), ["30 training and 10 test samples"]),
    "lines of Windows": (csv("windows.csv"), []),
    "blanks around headers": (csv("blank.csv"), []),
    "blanks around labels": (csv("cells.csv"), ["x", "y"]),
    "an empty cell that is filled": (csv("hole.csv").replace("hole.csv@", "hole.csv@fill=true,"), []),
    "a split column": (csv("split.csv"), []),
    "validation is a split": (csv("valid.csv"), []),
    "the same option twice": (npz("./ok.npz") + " --ridge 0.1 --ridge 0.1", []),
}

REFUSED = {
    # data
    "a truncated image": (images("broken/"), ["9.png"]),
    "an empty image": (images("zero/"), ["9.png"]),
    "two sizes": (images("sizes/"), ["image_size"]),
    "a test class that was never trained": (images("lone/"), ["zebra"]),
    "one class": (images("one/"), []),
    "no images": (images("void/"), ["void"]),
    "no class folders": (images("flat/"), ["flat"]),
    "a folder that is not there": (images("gone/"), ["gone", "does not exist"]),
    "a class that is not there": (images("plain/[0-5]"), ["2"]),
    "a backward range": (images("plain/[1-0]"), ["backwards"]),
    "an unknown setting": (images("plain/@image_sise=8"), ["image_size"]),
    "a setting for another source": (images("plain/@bins=3"), ["bins"]),
    "drop of a folder": (images("plain/@drop=a"), ["drop"]),
    "two files of one name": (npz("both.npz") + " --data-dir data", ["both.npz"]),
    "floats as images": (npz("./floats.npz"), ["float64", "(255 * x).round()"]),
    "integers as images": (npz("./wide.npz"), ["int64", "x.round().astype('uint8')"]),
    "channels first": (npz("./first.npz"), ["channels"]),
    "four channels": (npz("./four.npz"), ["4 channels"]),
    "labels from 1": (npz("./from1.npz"), ["0"]),
    "labels with -1": (npz("./minus.npz"), ["-1"]),
    "one-hot labels": (npz("./onehot.npz"), ["y_train.argmax(1)"]),
    "words as labels": (npz("./words.npz"), ["'cat'", "np.unique(labels.astype(str)"]),
    "NaN as a label": (npz("./nanlabel.npz"), ["y_train"]),
    "a class without samples": (npz("./gap.npz"), ["1"]),
    "an unseen test label": (npz("./unseen.npz"), ["2"]),
    "huge labels": (npz("./huge.npz"), ["1000000000"]),
    "infinite values": (npz("./infinite.npz"), ["infinite"]),
    "objects": (npz("./pickled.npz"), ["pickled.npz"]),
    "labels in a column": (npz("./column.npz"), ["(40, 1)", "y_train[:, 0]"]),
    "fewer labels than images": (npz("./short.npz"), ["3"]),
    "too few class names": (npz("./names.npz"), ["class"]),
    "a pointer of LFS": (npz("./text.npz"), ["text.npz"]),
    "an empty archive": (npz("./zero.npz"), ["zero.npz"]),
    "an archive with rows": (npz("./ok.npz@rows=3"), ["rows"]),
    "another encoding": (csv("latin.csv", "größe"), ["latin.csv"]),
    "a column twice": (csv("twice.csv"), ["'a'"]),
    "an empty cell": (csv("hole.csv"), ["line 6"]),
    "a table without rows": (csv("header.csv"), ["header.csv"]),
    "an empty table": (csv("zero.csv"), ["zero.csv"]),
    "a class with one row": (csv("once.csv"), ["class 'z' has 1 sample"]),
    "an unknown target": (csv("ok.csv", "lable"), ["label"]),
    "no target": (csv("ok.csv").replace("ok.csv@target=label", "ok.csv"), ["target"]),
    "another name in the test rows": (csv("dots.csv"), ["x."]),
    "the same task twice": (npz("./other.npz"), ["same"]),
    "a number of shots that is none": (audit(more="--shots 0"), ["shots"]),
    # models
    "weights beside a file that names its network": (audit(more="--weights half.safetensors"), ["weights"]),
    "such weights that do not exist": (audit(more="--weights gone.safetensors"), ["weights"]),
    "the original's too": (audit(more="--original-weights gone.safetensors"), ["weights"]),
    "a model that is not there": (audit("gone.safetensors"), ["gone.safetensors"]),
    "a pickle": (audit("model.pt"), ["pickle"]),
    "a truncated file": (audit("cut.safetensors"), ["cut.safetensors"]),
    "a web page": (audit("page.safetensors"), ["page.safetensors"]),
    "weights without a network": (audit("half.safetensors"), ["architecture"]),
    "a network without weights": (audit("cnn"), ["weights"]),
    "a misspelt network": (audit("cnnn --weights half.safetensors"), ["cnn"]),
    "weights of another network": (audit("cnn --weights foreign.safetensors"), ["zz."]),
    "weights of another shape": (
        audit("cnn --weights narrow.safetensors"),
        ["(1, 16, 1, 3, 3) instead of (16, 1, 3, 3)"],
    ),
    "NaN as weights of the original": (audit(original="cnn --original-weights nan.safetensors"), ["finite"]),
    "a folder as weights": (audit("cnn --weights data"), ["'data' is a folder"]),
    "an index whose shards are missing": (audit("cnn --weights model.safetensors.index.json"), ["gone.safetensors"]),
    "a function that is not there": (audit("nets.py:gud"), ["good"]),
    "a function without a result": (audit("nets.py:nothing"), ["nothing"]),
    "a function that returns weights": (audit("nets.py:state"), ["state"]),
    "a function that fails": (audit("nets.py:fails"), ["weights not found"]),
    "a function that wants more": (audit("nets.py:wants"), ["width"]),
    "a value for a function": (audit("nets.py:value"), ["value"]),
    "too few outputs": (audit("nets.py:small"), ["3 outputs"]),
    "another input size": (audit("nets.py:wide"), ["inputs"]),
    "tensors without values": (audit("nets.py:meta"), ["meta"]),
    "code that does not parse": (audit("syntax.py:net"), ["syntax.py"]),
    "code that is not there": (audit("gone.py:net"), ["gone.py"]),
    "an unknown head": (audit(more="--head nonsense"), ["head"]),
    "an empty folder as a model": (audit("hf:data"), ["data"]),
    # options
    "an unknown battery": (audit(more="--battery quick-v9"), ["quick-v1"]),
    "budgets that descend": (audit(more="--budgets 5,0"), ["budgets"]),
    "budgets in words": (audit(more="--budgets a,b"), ["budgets"]),
    "no seeds": (audit(more="--seeds 0"), ["seeds"]),
    "half a seed": (audit(more="--seeds 1.5"), ["1.5"]),
    "a threshold that does not exist": (audit(more="--set max_advantag=1"), ["max_advantage"]),
    "a threshold in words": (audit(more="--set max_advantage=much"), ["max_advantage"]),
    "a threshold that is not a number": (audit(more="--set max_advantage=.nan"), ["max_advantage"]),
    "a negative benign drop": (audit(more="--set max_benign_drop=-1"), ["max_benign_drop"]),
    "reported in per cent": (audit(more="--reported 23"), ["reported"]),
    "the benign task as the restricted one": (audit().replace("digits[5-9]", "digits[0-4]"), ["same"]),
    "immunize against the model's own task": (immunize(restricted="digits[0-4]"), ["same"]),
    "an unknown executor": (audit(more="--executor threads"), ["threads"]),
    "an executor without workers": (audit(more="--executor processes:0"), ["processes"]),
    "an unknown device": (audit(more="--device gpu"), ["gpu"]),
    "no threads": (audit(more="--threads 0"), ["threads"]),
    "an unknown defense": (immunize(more="--defense sofon"), ["sophon"]),
    "an unknown hyper-parameter": (immunize(more="--set iteration=3"), ["iterations"]),
    "a hyper-parameter twice": (immunize(more="--set alpha=1 --set alpha=2"), ["alpha"]),
    "true for a number": (immunize(more="--set iterations=true"), ["iterations"]),
    "a file in the folder's place": (audit().replace("{out}", "afile"), ["afile"]),
    "a folder of something else": (audit().replace("{out}", "data/.."), ["model.safetensors"]),
    # recipes
    "a key twice": ("run twice.yaml --out {out}", ["audit", "line"]),
    "an inner key twice": ("run inner.yaml --out {out}", ["seeds", "line"]),
    "a tab": ("run tab.yaml --out {out}", ["YAML"]),
    "two documents": ("run two.yaml --out {out}", ["YAML"]),
    "an empty recipe": ("run empty.yaml --out {out}", ["empty"]),
    "a list": ("run list.yaml --out {out}", ["mapping"]),
    "code in a recipe": ("run code.yaml --out {out}", ["code"]),
    "objects in a recipe": ("run python.yaml --out {out}", ["YAML"]),
    "another encoding of a recipe": ("run latin.yaml --out {out}", ["UTF-8"]),
    "a model without weights": ("run noweights.yaml --out {out}", ["pretrain"]),
    "a recipe that is not there": ("run gone.yaml --out {out}", ["gone.yaml"]),
    "a folder as a recipe": ("run data --out {out}", ["data"]),
    "a gate where nothing is judged": ("run condition/house-prices --gate --out {out}", ["gate"]),
    "a value that YAML cannot read": ("run quickstart --set title=[ --out {out}", ["YAML"]),
    "a report of nothing": ("report data", ["data"]),
    "a card of nothing": ("card data", ["data"]),
    "a replay of nothing": ("replay data", ["data"]),
    "a leaderboard of nothing": ("leaderboard data --out {out}", ["data"]),
}


def typed(line, out, capsys):
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line.replace("{out}", str(out))))
    captured = capsys.readouterr()
    answer = " ".join((captured.out + captured.err).split())
    assert "Traceback" not in answer
    assert "unexpected" not in answer, answer
    return ended.value.code, answer


@pytest.mark.parametrize("case", READ)
def test_is_read_as_its_owner_means(case, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    line, words = READ[case]
    code, answer = typed(line, tmp_path / "out", capsys)
    assert code == 0, answer
    assert not [word for word in words if word.lower() not in answer.lower()], answer
    assert (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_with_one_message(case, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    before = set(world.rglob("*"))
    line, words = REFUSED[case]
    code, answer = typed(line, tmp_path / "out", capsys)
    assert code == 2, answer
    assert not [word for word in words if word.lower() not in answer.lower()], answer
    assert not (tmp_path / "out" / "result.json").exists()
    assert {p for p in world.rglob("*") if "__pycache__" not in str(p)} <= before
