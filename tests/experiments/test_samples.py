"""Pictures of a protocol: who is shown, after what, from which noise; the distance; kept, and never done twice."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from holdfast.errors import HoldfastError
from holdfast.experiments.measurements import sample_images, samples
from holdfast.experiments.measurements.sample_images import ModelSamples
from holdfast.experiments.measurements.sample_tables import _about_samples
from holdfast.experiments.measurements.samples import PicturedModel, Samples
from holdfast.experiments.recipe import ProtocolRecipe
from holdfast.experiments.runner import run_recipe
from holdfast.metrics import inception
from holdfast.metrics.generation import Distance
from holdfast.models import ModelSpec, load_model
from holdfast.results import read_result
from holdfast.results.image_grid import picture
from holdfast.runtime.run import Run
from holdfast.runtime.storage import load_tensors, save_tensors
from holdfast.tasks import load_task
from holdfast.tasks.splits import halves
from pipelines import saved_clip

DENOISING = {"kind": "denoising", "test_limit": 40}
BASE = {
    "kind": "protocol",
    "title": "Digits",
    "threads": 1,
    "seeds": 1,
    "epochs": [0, 1],
    "max_steps_per_epoch": 3,
    "settings": {
        "digits": {
            "model": {"name": "unet", "options": {"widths": [8], "attention": 4}},  # in the middle alone
            "pretrain": {"steps": 20, "batch_size": 16},
            "benign": {"data": "digits[0-4]", **DENOISING},
            "restricted": {"data": "digits[5-9]", **DENOISING},
        }
    },
    "defenses": {
        "SOPHON": {
            "name": "sophon", "loss": "dos", "iterations": 1, "steps": 1, "batch_sizes": [8], "reinforcement_batch": 8,
            "max_benign_drop": 1.0,
        }
    },
    "attacks": {
        "direct": {"batch_size": 8, "learning_rate": 1e-3, "optimizer": "adam"},
        "new head": {"batch_size": 8, "learning_rate": 1e-3, "optimizer": "adam", "initialisation": "head"},
    },
    "pictures": {"denoised": 3, "samples": 4, "ddim_steps": 3, "measured": 12},
}  # fmt: skip


def recipe(**changes):
    return ProtocolRecipe.model_validate({**BASE, **changes})


def run(folder, chosen=None, **more):
    return run_recipe(chosen or recipe(), folder=folder, device="cpu", quiet=True, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pictures") / "whole"
    run(made)
    return made


@pytest.fixture(scope="module")
def result(folder):
    return read_result(folder)


def test_who_is_shown(result):
    figures = {name: f.rows for name, f in result.figures.items() if f.kind == "pictures"}
    assert figures == {
        "restored_restricted": ["test images", "with noise", "scratch", "original", "SOPHON"],
        "samples_restricted": ["test images", "scratch", "original", "SOPHON"],
        "restored_benign": ["test images", "with noise", "original", "SOPHON"],
        "samples_benign": ["test images", "original", "SOPHON"],
    }
    assert "step 250 of 1000" in result.figures["restored_restricted"].note


def test_pictures_are_files_as_well(result, folder):
    for name in ("restored_restricted", "samples_restricted", "restored_benign", "samples_benign"):
        assert np.array_equal(np.asarray(Image.open(folder / "pictures" / f"{name}.png")),
                              np.asarray(picture(result.figures[name])))  # fmt: skip


def test_distances_stand_beside_a_floor(result):
    table = result.tables["generation"]
    rows = {row["model"]: row for row in table.rows}
    assert list(rows) == ["training images", "scratch", "original", "SOPHON"]
    assert rows["scratch"]["benign"].n == 0
    for model in ("training images", "original", "SOPHON"):
        assert rows[model]["restricted"].mean is not None
        assert rows[model]["benign_error"].mean > 0
    # Real images are nearer to real ones than what a hardly trained model makes.
    assert rows["training images"]["benign"].mean < rows["original"]["benign"].mean
    assert "neither FID nor KID" in table.note
    assert "12 samples" in table.note


def test_the_attack_shown_is_the_one_in_the_tables():
    task = load_task("digits[5-9]@kind=denoising,test_limit=40")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model("unet", task)
    adversary = recipe().plan()[0].adversary
    mine = halves(task)[1]
    held = []
    whole = adversary.attack(model, mine, budgets=[0, 1, 3], run=Run(0), seed=0)
    adversary.attack(model, mine, budgets=[3], run=Run(0), seed=0, keep=held.append)
    assert mine.audit_score(held[0]) == whole.scores[-1]


def unfinished(folder, copy):
    """A copy of a whole run, killed before it wrote its result."""
    shutil.copytree(folder, copy)
    (copy / "result.json").unlink()
    return sorted((copy / "checkpoints" / "pictures").iterdir())


def test_only_the_seed_decides_wherever_it_runs(folder, result, tmp_path):
    for file in unfinished(folder, tmp_path / "copy"):
        file.unlink()
    assert run(tmp_path / "copy", executor="processes:1").numbers() == result.numbers()


def test_what_was_made_is_not_made_again(folder, result, tmp_path, monkeypatch):
    gone = unfinished(folder, tmp_path / "copy")
    assert len(gone) == 5
    gone[0].unlink()
    made = []
    honest = samples._make
    monkeypatch.setattr(samples, "_make", lambda studio, sitting: made.append(sitting) or honest(studio, sitting))
    monkeypatch.setattr(sample_images, "pretrain", None)
    assert run(tmp_path / "copy").numbers() == result.numbers()
    assert len(made) == 1


def test_a_damaged_album_is_named(folder, tmp_path):
    file = unfinished(folder, tmp_path / "copy")[0]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(HoldfastError, match=file.stem):
        run(tmp_path / "copy")


def test_an_album_of_other_pictures_is_named(folder, tmp_path):
    file = unfinished(folder, tmp_path / "copy")[0]
    tensors, meta = load_tensors(file)
    save_tensors(file, {"samples": tensors["samples"]}, meta)
    with pytest.raises(HoldfastError, match=f"{file.stem}.*damaged .it holds pictures .*delete it"):
        run(tmp_path / "copy")


def test_all_models_restore_the_same_noised_images(folder):
    albums = [load_tensors(path)[0] for path in sorted((folder / "checkpoints" / "pictures").iterdir())]
    assert {tuple(sorted(album)) for album in albums} == {("restored 250", "samples")}
    assert {tuple(album["restored 250"].shape) for album in albums} == {(3, 1, 8, 8)}
    distances = [float((a["restored 250"] - b["restored 250"]).abs().mean()) for a in albums for b in albums]
    assert max(distances) < 0.5


def test_without_labels_there_is_no_measure(tmp_path):
    """One class: nothing to tell apart, so no features; something else must not take their place."""
    plain = recipe(
        settings={"digits": {**BASE["settings"]["digits"], "benign": {"data": "digits[3]", **DENOISING}}},
        defenses={}, attacks={"direct": BASE["attacks"]["direct"]},
        pictures={**BASE["pictures"], "noise_step": [10, 700]},
    )  # fmt: skip
    found = run(tmp_path / "new", plain)
    assert "generation" not in found.tables
    assert any(
        "distance of samples from test images was not measured by a classifier" in finding for finding in found.findings
    )
    assert [name for name, f in found.figures.items() if f.kind == "pictures"] == [
        "restored_restricted_10", "restored_restricted_700", "samples_restricted",
        "restored_benign_10", "restored_benign_700", "samples_benign",
    ]  # fmt: skip


def test_a_model_that_gives_no_numbers_is_crossed_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_images, "CLASSIFIER_STEPS", 5)  # no distance is taken
    monkeypatch.setattr(samples, "denoise", lambda model, shown, *_, **__: torch.full_like(shown, torch.nan))
    monkeypatch.setattr(samples, "sample", lambda model, count, **_: torch.full((count, 1, 8, 8), torch.nan))
    found = run(tmp_path / "new", recipe(attacks={}))
    cell = {row["model"]: row for row in found.tables["generation"].rows}["original"]["benign"]
    assert (cell.mean, cell.n) == (None, 1)
    pixels = np.asarray(picture(found.figures["samples_benign"]))
    assert tuple(pixels[-1, 0]) == (200, 30, 30, 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": {"attack": "dirct"}}, "did you mean 'direct'"),
        ({"pictures": {"samples": 0}}, "samples"),
    ],
)
def test_mistakes_in_a_recipe_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"noise_step": 1000}, "expected numbers from 0 to 999"),
        ({"noise_step": []}, "expected numbers from 0 to 999"),
        ({"ddim_steps": 1001}, "has 1000 steps"),
        ({"measured": 2}, "at least 3, or 0"),
    ],
)
def test_what_cannot_work_costs_nothing(pictures, message, tmp_path):
    with pytest.raises(HoldfastError, match=message):
        run(tmp_path / "new", recipe(pictures=pictures))
    assert not (tmp_path / "new").exists()


def test_samples_of_another_size_cost_nothing(tmp_path):
    load_model(ModelSpec(name="unet", options={"widths": [8]}), load_task("digits@kind=denoising")).save_pretrained(
        tmp_path / "p"
    )
    larger = {**BASE["settings"]["digits"], "model": {"name": f"diffusers:{tmp_path / 'p'}"}}
    larger |= {part: {**larger[part], "image_size": 16} for part in ("benign", "restricted")}
    with pytest.raises(HoldfastError, match=r"draws samples of shape \(1, 8, 8\).*have \(1, 16, 16\)"):
        run(tmp_path / "new", recipe(settings={"x": larger}))
    assert not (tmp_path / "new").exists()


def test_noise_that_is_another_on_the_restricted_task_costs_nothing(tmp_path):
    other = {**BASE["settings"]["digits"]}
    other["restricted"] = {**other["restricted"], "schedule": "squaredcos_cap_v2"}
    with pytest.raises(HoldfastError, match=r"its task 'digits.5-9.' has squaredcos_cap_v2"):
        run(tmp_path / "new", recipe(settings={"x": other}))
    assert not (tmp_path / "new").exists()


def test_classifiers_have_no_pictures(tmp_path):
    plain = {**BASE["settings"]["digits"], "model": {"name": "cnn"}}
    plain |= {part: {"data": plain[part]["data"]} for part in ("benign", "restricted")}
    with pytest.raises(HoldfastError, match="no setting has one"):
        run(tmp_path / "new", recipe(settings={"x": plain}, defenses={}))


def test_a_quarter_of_the_noise_by_default():
    assert Samples().levels(1000) == (250,)
    assert Samples(noise_step=3).levels(1000) == (3,)


@pytest.mark.parametrize(
    ("distance", "said"),
    [
        (
            Distance(8.0, 0.1),
            "Samples of D as released are farther from benign test images than the original's (4 times as",
        ),
        (Distance(2.1, 0.1), "are not farther from benign test images than the original's, within two standard errors"),
        (Distance(1.0, 0.1), "are not farther from benign test images"),
        (Distance(math.nan, math.nan), "are not pictures: they are not finite"),
    ],
)
def test_findings_say_whether_released_models_still_make_pictures(distance, said):
    albums = {
        PicturedModel("s", "original", "original"): ModelSamples({}, Distance(2.0, 0.1)),
        PicturedModel("s", "D", "immunized"): ModelSamples({}, distance),
        PicturedModel("s", "scratch", "scratch", adversary=recipe().plan()[0].adversary, steps=1): ModelSamples(
            {},
            Distance(9.0, 0.1),
        ),
    }
    (found,) = _about_samples(albums)
    assert said in found


CAPTIONED = {"kind": "text-to-image", "caption": "a photo of the digit {}", "test_limit": 40}


def few_colours(place):
    """In place of the Inception network: the mean colours of four quarters."""
    assert place == "weights.pth"

    class Network(torch.nn.Module):
        def forward(self, x):
            return (F.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1),)

    return Network()


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A protocol of text-to-image models, with a CLIP model and what stands for Inception."""
    setting = {
        "model": {"name": "text-unet", "options": {"widths": [8], "attention": 4}},
        "pretrain": {"steps": 20, "batch_size": 16},
        "benign": {"data": "digits[0-4]", **CAPTIONED},
        "restricted": {"data": "digits[5-9]", **CAPTIONED},
    }
    clip = saved_clip(tmp_path_factory.mktemp("clip"))
    pictures = {**BASE["pictures"], "early": [0], "error_steps": 2, "clip": clip, "inception": "weights.pth"}
    chosen = recipe(
        settings={"digits": setting},
        shots=8,
        pictures=pictures,
        attacks={"direct": BASE["attacks"]["direct"]},
    )
    folder = tmp_path_factory.mktemp("captions") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        for module in (samples, inception):
            patch.setattr(module, "load_inception", few_colours)
        run(folder, chosen)
    return read_result(folder)


class TestCaptions:
    """Samples of text-to-image models."""

    def test_a_row_for_each_budget(self, captioned):
        early = [f"{model}, {n}" for model in ("scratch", "original", "SOPHON") for n in ("0 steps", "1 step")]
        assert captioned.figures["samples_restricted"].rows == ["test images", *early]
        assert captioned.figures["samples_benign"].rows == ["test images", "original", "SOPHON"]
        assert "Each has the caption of the test image in its place" in captioned.figures["samples_benign"].note

    def test_errors_by_noise_level(self, captioned):
        lines = captioned.figures["errors_restricted"]
        assert (lines.x, list(lines.series)) == ([0.0, 999.0], ["scratch", "original", "SOPHON"])
        assert all(len(values) == 2 and min(values) > 0 for values in lines.series.values())

    def test_samples_are_compared_with_what_was_asked_for(self, captioned):
        table = captioned.tables["generation"]
        shares = {row["model"]: row for row in table.rows if row["model"] != "training images"}
        assert all(0 <= shares[m]["restricted_recognised"].mean <= 100 for m in ("scratch", "original", "SOPHON"))
        assert all(-100 <= shares[m]["benign_clip"].mean <= 100 for m in ("original", "SOPHON"))
        assert "learned all captions of both tasks" in table.note
        assert any("recognised as what the restricted captions say" in finding for finding in captioned.findings)

    def test_kid_and_fid_where_inception_is_given(self, captioned):
        table = captioned.tables["generation"]
        rows = {row["model"]: row for row in table.rows}
        for model, roles in (("training images", 2), ("scratch", 1), ("original", 2), ("SOPHON", 2)):
            for role in ("restricted", "benign")[:roles]:
                assert rows[model][f"{role}_fid"].mean > 0
                assert rows[model][f"{role}_kid_error"].mean > 0
        assert rows["scratch"]["benign_fid"].mean is None
        assert rows["training images"]["benign_fid"].mean < rows["scratch"]["restricted_fid"].mean
        assert "weights weights.pth" in table.note


def test_recognised_counts_the_classes_of_both_tasks(tmp_path):
    """Real images of the captions that were asked for are recognised, others are not."""
    tasks = [load_task(f"digits[{which}]@kind=text-to-image,test_limit=200") for which in ("0-4", "5-9")]
    run = Run(seed=0, device=torch.device("cpu"), folder=tmp_path)
    images = sample_images.setting_images(Samples(measured=60), *tasks, run)
    attack = recipe().plan()[0].adversary
    for adversary, task in ((None, tasks[0]), (attack, tasks[1])):
        subject = PicturedModel("s", "m", "immunized", adversary)
        real = sample_images.drawn_images(task, "test", 60, run)
        right, wrong = images.recognised(real, subject, run), images.recognised(real.flip(0), subject, run)
        assert right > 0.8
        assert wrong < 0.5


def test_clip_needs_captions_and_a_folder(tmp_path):
    pictures = {**BASE["pictures"], "clip": str(tmp_path)}
    with pytest.raises(HoldfastError, match="no setting has any"):
        run(tmp_path / "a", recipe(pictures=pictures))
    setting = {**BASE["settings"]["digits"], "model": {"name": "text-unet", "options": {"widths": [8]}}}
    setting |= {"benign": {"data": "digits[0-4]", **CAPTIONED}, "restricted": {"data": "digits[5-9]", **CAPTIONED}}
    with pytest.raises(HoldfastError, match="Expected a folder with a CLIPModel"):
        run(tmp_path / "b", recipe(pictures=pictures, settings={"x": setting}))


def test_inception_needs_its_file_and_measured_samples(tmp_path):
    for change, words in (({}, "Inception weights"), ({"measured": 0}, "measured is 0")):
        pictures = {**BASE["pictures"], "inception": str(tmp_path / "none.pth"), **change}
        with pytest.raises(HoldfastError, match=words):
            run(tmp_path / words, recipe(pictures=pictures))


def test_captions_of_single_images_are_not_classes():
    digits = load_task("digits[0-4]@kind=text-to-image,train_limit=40")
    assert sample_images._labelled(digits, digits) is None


@pytest.mark.parametrize(("far", "said"), [(3.0, False), (8.0, True)])
def test_a_model_is_said_to_be_ruined_beyond_twice_the_distance(far, said):
    albums = {
        PicturedModel("s", "original", "original"): ModelSamples({}, Distance(2.0, 0.1)),
        PicturedModel("s", "D", "immunized"): ModelSamples({}, Distance(far, 0.1)),
    }
    assert ("ruined" in _about_samples(albums)[0]) is said
