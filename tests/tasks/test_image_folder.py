"""Folders of images: pixels, files, splits and sounds."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from holdfast.errors import HoldfastError
from holdfast.tasks import ArrayTask, load_task


def fill(place: Path, count: int = 4, shade: int = 100, suffix: str = ".png") -> None:
    place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (4, 4), (shade, i, 0)).save(place / f"{i}{suffix}")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes with both splits; tests add their image to train/cat."""
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            fill(tmp_path / "pets" / split / name, shade=100 * i + 5 + (split == "test"))
    return tmp_path / "pets"


def values(task: ArrayTask, split: str = "train") -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in pixel) for pixel in task._x[split].flatten(2).permute(0, 2, 1).flatten(0, 1)}


def said(task: ArrayTask) -> str:
    return "; ".join(task.notes)


class TestPixels:
    """One more image in train/cat: its pixels and its note."""

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA-like"])
    def test_transparent_pixels_are_white(self, pets, mode):
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        image.putpixel((0, 0), (0, 0, 0, 255))
        if mode == "P":
            image = image.quantize(4)
        elif mode == "PA-like":
            image = Image.new("P", (4, 4), 0)
            image.putpalette([0, 0, 0, 9, 9, 9])
            image.putpixel((0, 0), 1)
            image.info["transparency"] = 0
        else:
            image = image.convert(mode)
        image.save(pets / "train" / "cat" / "clear.png")
        task = load_task(str(pets))
        assert (255, 255, 255) in values(task)
        assert "1 images with transparent pixels, put on white" in said(task)

    def test_opaque_alpha_is_not_counted_and_changes_nothing(self, pets):
        before = load_task(str(pets)).facts().sha256
        for file in pets.rglob("*.png"):
            Image.open(file).convert("RGBA").save(file)
        task = load_task(str(pets))
        assert task.facts().sha256 == before
        assert task.notes == ()

    def test_exif_orientation_turns(self, pets):
        image = Image.new("RGB", (4, 4))
        image.paste((250, 250, 250), (0, 0, 4, 1))  # white at the top; 6: to be turned by 90 degrees to the right
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(pets / "train" / "cat" / "turned.png", exif=exif)
        task = load_task(str(pets))
        (turned,) = (x for x in task._x["train"] if int(x.max()) == 250)
        assert turned[0, :, 3].tolist() == [250] * 4
        assert turned[0, :, :3].max() == 0
        assert "1 images turned as their EXIF orientation says" in said(task)

    @pytest.mark.parametrize(("top", "bits"), [(200, 8), (900, 10), (4095, 12), (16000, 14), (65535, 16)])
    def test_sixteen_bits_are_scaled_by_the_largest_value_of_the_folder(self, pets, top, bits):
        for i, value in enumerate((0, top // 2, top)):
            Image.fromarray(np.full((4, 4), value, np.uint16)).save(pets / "train" / "cat" / f"deep{i}.png")
        task = load_task(f"{pets}@channels=1")
        found = {int(v) for (v,) in values(task)}
        assert {round(v * 255 / (2**bits - 1)) for v in (0, top // 2, top)} <= found
        assert f"3 grey images of {bits} bits, scaled to 8" in said(task)

    def test_a_deep_pgm_has_a_range_of_its_own(self, pets):
        (pets / "train" / "cat" / "deep.pgm").write_bytes(b"P5 4 4 4095\n" + (4095).to_bytes(2, "big") * 16)
        assert (255,) in values(load_task(f"{pets}@channels=1"))

    @pytest.mark.parametrize("deep", [4095, 65535])
    def test_colour_of_sixteen_bits(self, pets, deep):
        import struct
        import zlib

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        row = b"\0" + deep.to_bytes(2, "big") * 12
        png = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(row * 4))
        (pets / "train" / "cat" / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png + chunk(b"IEND", b""))
        if deep == 4095:
            with pytest.raises(HoldfastError, match=r"deep\.png' .*almost black; scale them to 8 bits"):
                load_task(str(pets))
        else:
            assert "1 colour images of 16 bits a channel" in said(load_task(str(pets)))

    def test_the_transparent_value_of_sixteen_bits_is_white(self, pets):
        deep = np.full((4, 4), 60000, np.uint16)
        deep[0, 0] = 7
        Image.fromarray(deep).save(pets / "train" / "cat" / "deep.png", transparency=7)
        task = load_task(f"{pets}@channels=1")
        assert {(255,), (round(60000 / 257),)} <= values(task)
        assert (0,) not in values(task)
        assert "1 images with transparent pixels, put on white" in said(task)

    def test_colour_of_sixteen_bits_in_a_tiff_is_counted(self, pets):
        import struct

        pixels = struct.pack("<48H", *[0xAB00] * 48)
        entries = [  # width, height, bits a sample, no compression, RGB, strip, samples, rows, bytes
            (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 208), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, len(pixels)),
        ]  # fmt: skip
        head = b"II*\0" + struct.pack("<IH", 8, len(entries))
        head += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
        tiff = head.ljust(200, b"\0") + struct.pack("<4H", 16, 16, 16, 0) + pixels
        (pets / "train" / "cat" / "deep.tif").write_bytes(tiff)
        task = load_task(str(pets))
        assert (0xAB, 0xAB, 0xAB) in values(task)
        assert "1 colour images of 16 bits a channel: the upper 8 were taken" in said(task)

    def test_an_orientation_that_does_not_exist_turns_nothing(self, pets):
        exif = Image.Exif()
        exif[0x0112] = 9
        Image.new("RGB", (4, 4)).save(pets / "train" / "cat" / "odd.png", exif=exif)
        assert load_task(str(pets)).notes == ()

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
    def test_each_format_is_turned_once(self, tmp_path, suffix):
        exif = Image.Exif()
        exif[0x0112] = 6
        for name, shade in (("a", 0), ("b", 90)):
            (tmp_path / "tall" / name).mkdir(parents=True)
            for i in range(3):
                wide = Image.new("RGB", (8, 4), (shade, i, 0))
                wide.save(tmp_path / "tall" / name / f"{i}{suffix}", exif=exif)
        assert load_task(f"{tmp_path}/tall").input_shape == (3, 8, 4)

    def test_other_modes(self, pets):
        Image.new("CMYK", (4, 4), (0, 0, 0, 255)).save(pets / "train" / "cat" / "print.tif")
        Image.new("1", (4, 4), 1).save(pets / "train" / "cat" / "bits.png")
        task = load_task(str(pets))
        assert {(0, 0, 0), (255, 255, 255)} <= values(task)
        assert "1 images of mode CMYK, converted" in said(task)
        assert "1 images of mode 1, converted" in said(task)

    def test_the_first_frame_is_taken_and_counted(self, pets):
        frames = [Image.new("RGB", (4, 4), (shade, shade, shade)) for shade in (7, 9)]
        frames[0].save(pets / "train" / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
        task = load_task(str(pets))
        assert (7, 7, 7) in values(task)
        assert (9, 9, 9) not in values(task)
        assert "1 images with several frames" in said(task)

    def test_32_bits_and_truncated_files_are_refused(self, pets):
        odd = pets / "train" / "cat" / "odd.tif"
        for pixels in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 7, np.int32)):
            Image.fromarray(pixels).save(odd)
            with pytest.raises(HoldfastError, match=r"odd\.tif' has pixels of 32 bits"):
                load_task(str(pets))
        odd.unlink()
        whole = (pets / "train" / "cat" / "0.png").read_bytes()
        (pets / "train" / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(HoldfastError, match=r"cut\.png' cannot be opened"):
            load_task(str(pets))


class TestFiles:
    def test_all_that_pillow_opens_at_any_depth(self, pets):
        before = load_task(str(pets)).size("train")
        fill(pets / "train" / "cat" / "more" / "deeper", 1, suffix=".ppm")
        fill(pets / "train" / "dog" / "more", 1, suffix=".JPEG")
        Image.new("L", (4, 4)).save(pets / "train" / "dog" / "grey.pgm")
        assert load_task(str(pets)).size("train") == before + 3

    def test_a_stereo_photograph_is_its_first_view(self, pets):
        views = [Image.new("RGB", (4, 4), (shade,) * 3) for shade in (7, 9)]
        views[0].save(pets / "train" / "cat" / "both.mpo", save_all=True, append_images=views[1:])
        task = load_task(str(pets))
        assert (7, 7, 7) in values(task)
        assert "1 images with several frames" in said(task)

    def test_files_and_folders_beside_the_splits_are_noted(self, pets):
        (pets / "cover.png").write_bytes((pets / "train" / "cat" / "0.png").read_bytes())
        (pets / "README.md").write_text("pets")
        fill(pets / ".cache" / "cat", 1)
        task = load_task(str(pets))
        assert task.size("train") == 8
        assert all(part in said(task) for part in ("1 .png", "1 .md", "left out: .cache"))

    def test_nothing_is_skipped_in_silence(self, pets):
        (pets / "train" / "cat" / "readme.txt").write_text("cats")
        (pets / "train" / "cat" / "film.mp4").write_text("cats")
        (pets / "train" / "labels.csv").write_text("a,b")
        for junk in (".DS_Store", "Thumbs.db", "._0.png"):
            (pets / "train" / "cat" / junk).write_text("junk")
        task = load_task(str(pets))
        assert task.size("train") == 8
        assert all(f"1 {suffix}" in said(task) for suffix in (".txt", ".mp4", ".csv"))

    def test_system_hidden_and_empty_folders_are_not_classes(self, tmp_path):
        for name in ("cat", "dog"):
            fill(tmp_path / "zoo" / name, 8)
        fill(tmp_path / "zoo" / "__MACOSX" / "cat", 1)
        fill(tmp_path / "zoo" / ".ipynb_checkpoints", 1)
        (tmp_path / "zoo" / "empty").mkdir()
        task = load_task(f"{tmp_path}/zoo")
        assert task.class_names == ["cat", "dog"]
        assert "not classes: empty" in said(task)
        assert "__MACOSX" in said(task)
        assert ".ipynb_checkpoints" in said(task)

    def test_a_link_to_a_folder_above_ends(self, pets):
        before = load_task(str(pets)).size("train")
        (pets / "train" / "cat" / "loop").symlink_to(pets / "train" / "cat")
        assert load_task(str(pets)).size("train") == before

    def test_sounds_and_images_do_not_mix(self, pets):
        (pets / "train" / "cat" / "miau.wav").write_bytes(b"RIFF")
        with pytest.raises(HoldfastError, match=r"1 sounds \(miau\.wav\) and 16 images"):
            load_task(str(pets))

    def test_a_wrapping_folder_is_named(self, pets, tmp_path):
        for split in ("train", "test"):
            (pets / split).rename(pets / f"{split}s")
        (tmp_path / "outer").mkdir()
        for name in ("cat", "dog"):
            fill(tmp_path / "outer" / "inner" / name, 2)
        with pytest.raises(HoldfastError, match=r"only one class, 'inner'.*cat, dog: give '.*outer/inner'"):
            load_task(f"{tmp_path}/outer")

    def test_one_name_written_in_two_ways(self, pets):
        composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
        fill(pets / "train" / composed, 2)
        fill(pets / "test" / apart, 2)
        assert load_task(str(pets)).class_names == ["caf\u00e9", "cat", "dog"]
        fill(pets / "train" / apart, 2)
        with pytest.raises(HoldfastError, match="two folders called"):
            load_task(str(pets))


class TestSplits:
    @pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
    @pytest.mark.parametrize("held", ["testing", "valid", "dev", "Test", "val"])
    def test_other_names_of_splits_are_understood(self, pets, train, held):
        (pets / "train").rename(pets / train)
        (pets / "test").rename(pets / held)
        task = load_task(str(pets))
        assert task.class_names == ["cat", "dog"]
        assert (task.size("train"), task.size("test")) == (8, 8)
        assert f"trained on the folder '{train}', tested on '{held}'" in said(task)

    @pytest.mark.parametrize("held", ["holdout", "eval"])
    def test_one_split_alone_is_refused(self, pets, held):
        (pets / "test").rename(pets / held)
        with pytest.raises(HoldfastError, match=f"holds the folders {held}, train; expected one for training"):
            load_task(str(pets))

    @pytest.mark.parametrize(
        ("train", "held"), [("training_set", "test_set"), ("seg_train", "seg_test"), ("trn", "tst"), ("a", "my-val")]
    )
    def test_names_that_look_like_splits_are_refused(self, pets, train, held):
        (pets / "train").rename(pets / train)
        (pets / "test").rename(pets / held)
        with pytest.raises(HoldfastError, match=f"{train}, and each holds cat, dog|{held}, and each holds cat, dog"):
            load_task(str(pets))

    def test_domains_are_classes_and_their_common_folders_are_noted(self, pets):
        (pets / "train").rename(pets / "photo")
        (pets / "test").rename(pets / "sketch")
        task = load_task(str(pets))
        assert task.class_names == ["photo", "sketch"]
        assert "each holds folders of the same names (cat, dog)" in said(task)

    def test_different_sizes_in_the_splits_are_refused_with_the_remedy(self, pets):
        for file in (pets / "test").rglob("*.png"):
            Image.open(file).resize((6, 5)).save(file)
        with pytest.raises(HoldfastError, match="for training are 4x4, for testing 6x5; give image_size"):
            load_task(str(pets))
        assert load_task(f"{pets}@image_size=4").input_shape == (3, 4, 4)

    def test_two_of_one_name_are_refused(self, pets):
        fill(pets / "Test" / "cat", 1)
        with pytest.raises(HoldfastError, match="holds the folders Test, test, train"):
            load_task(str(pets))

    def test_a_third_folder_is_noted(self, pets):
        fill(pets / "val" / "cat", 1)
        fill(pets / "unlabelled", 1)
        assert "left out: val, unlabelled" in said(load_task(str(pets)))

    def test_pictures_of_trains_are_a_class(self, tmp_path):
        for name in ("bus", "train"):
            fill(tmp_path / "vehicles" / name, 8)
        assert load_task(f"{tmp_path}/vehicles").class_names == ["bus", "train"]

    def test_images_in_splits_without_classes_are_refused(self, tmp_path):
        for name in ("train", "test"):
            fill(tmp_path / "bare" / name, 8)
        with pytest.raises(HoldfastError, match="train' has no sub-folders"):
            load_task(f"{tmp_path}/bare")
        assert load_task(f"{tmp_path}/bare@kind=denoising").size("train") == 8

    def test_a_class_without_training_images(self, pets):
        (pets / "train" / "owl").mkdir()
        fill(pets / "test" / "owl", 1)
        with pytest.raises(HoldfastError, match="class 'owl' that train does not have"):
            load_task(str(pets))

    def test_a_class_without_test_images_is_noted(self, pets):
        fill(pets / "train" / "owl", 1)
        assert "1 classes have no test images: owl" in said(load_task(str(pets)))


def test_numbered_folders_are_chosen_by_their_names(tmp_path):
    for c in range(12):
        fill(tmp_path / "numbers" / str(c), 4, shade=10 * c)
    task = load_task(f"{tmp_path}/numbers[0-2]")
    assert (task.class_names, task.name) == (["0", "1", "2"], "numbers[0-2]")
    assert sorted({int(x[0, 0, 0]) for x in task._x["train"]}) == [0, 10, 20]
    assert load_task(f"{tmp_path}/numbers").class_names[:3] == ["0", "1", "10"]  # as torchvision's ImageFolder
    with pytest.raises(HoldfastError, match="no class called 12; its classes are 0, 1, 10"):
        load_task(f"{tmp_path}/numbers[12]")


def test_a_share_that_is_too_small_for_the_classes_is_refused(tmp_path):
    for c in range(10):
        fill(tmp_path / "many" / f"c{c}", 2, shade=10 * c)
    with pytest.raises(HoldfastError, match=r"20 samples in 10 classes .*test_fraction from 0\.5 to 0\.5"):
        load_task(f"{tmp_path}/many@test_fraction=0.1")
    assert load_task(f"{tmp_path}/many@test_fraction=0.5").size("test") == 10


def test_unreadable_folders_are_named(pets, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(HoldfastError, match="cannot be read: Permission denied"):
        load_task(str(pets))


def test_values_stay_eight_bits(pets):
    assert load_task(str(pets))._x["train"].dtype == torch.uint8


class TestSounds:
    @pytest.fixture
    def tones(self, tmp_path):
        for c, name in enumerate("ab"):
            (tmp_path / "tones" / name / "deep").mkdir(parents=True)
            for i in range(4):
                tone = 9000 * np.sin(np.arange(4000) * (0.2 + c + i / 10))
                wavfile.write(tmp_path / "tones" / name / "deep" / f"{i}.WAV", 8000, tone.astype(np.int16))
        return tmp_path / "tones"

    def test_lengths_are_counted(self, tones):
        wavfile.write(tones / "a" / "long.wav", 8000, np.ones((40000, 2), np.int16))
        task = load_task(str(tones))
        assert task.size("train") + task.size("test") == 9
        assert task.input_shape == (1, 40, 61)
        assert "8 sounds shorter than 0.99 s, filled up with silence" in said(task)
        assert "1 sounds longer than 0.99 s, cut off" in said(task)

    @pytest.mark.parametrize(
        ("rate", "sound", "message"),
        [
            (8000, np.array([], np.int16), "holds no samples"),
            (8000, np.full(4000, np.nan, np.float32), "values that are not finite"),
            (4000, np.ones(4000, np.int16), "Sounds of 4000 Hz"),
        ],
    )
    def test_unusable_sounds_are_named(self, tones, rate, sound, message):
        wavfile.write(tones / "a" / "odd.wav", rate, sound)
        with pytest.raises(HoldfastError, match=rf"odd\.wav'.* {message}"):
            load_task(str(tones))
