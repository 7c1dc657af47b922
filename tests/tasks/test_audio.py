from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from holdfast.errors import HoldfastError
from holdfast.models import load_model
from holdfast.tasks import TaskSpec, load_task
from holdfast.tasks.audio import BANDS, TOP, WINDOWS, spectrograms
from holdfast.tasks.splits import halves


def tone(frequency: float, rate: int = 8000, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def centre(band: int) -> float:
    """Centre frequency of a band, counted from the lowest, by the definition of the mel scale."""
    mel = 2595 * np.log10(1 + TOP / 700) * (band + 1) / (BANDS + 1)
    return 700 * (10 ** (mel / 2595) - 1)


class TestSpectrograms:
    @pytest.mark.parametrize("band", [3, 10, 20, 30, 38])
    def test_a_tone_is_in_its_band_all_the_time(self, band):
        (picture,) = spectrograms([tone(centre(band))], 8000)
        assert picture.shape == (BANDS, WINDOWS)
        assert (picture.argmax(0) == BANDS - 1 - band).all()  # high tones are above

    @pytest.mark.parametrize("rate", [11025, 16000, 22050, 44100, 48000])
    def test_pictures_do_not_depend_on_the_rate(self, rate):
        here, there = (spectrograms([tone(700, r) + tone(2100, r)], r).astype(int) for r in (8000, rate))
        assert here.shape == there.shape
        assert np.abs(here - there).mean() < 1

    def test_nor_on_loudness_or_the_kind_of_number(self):
        sound = np.round(1000 * tone(500)).astype(np.int16)
        loud, quiet = spectrograms([sound], 8000), spectrograms([sound.astype(np.float32) / 7e5], 8000)
        assert np.abs(loud.astype(int) - quiet).max() <= 1

    def test_eighty_decibels_are_the_whole_range(self):
        both = tone(centre(30)) + 1e-2 * tone(centre(5))  # 40 dB below
        (picture,) = spectrograms([both], 8000)
        assert picture[BANDS - 1 - 30].min() == 255
        assert np.abs(picture[BANDS - 1 - 5].astype(int) - 127).max() <= 8  # bands are not equally wide
        assert picture.min() == 0

    def test_time_goes_to_the_right_and_short_sounds_end_in_silence(self):
        (picture,) = spectrograms([tone(1000, seconds=0.5)], 8000)
        assert (picture[:, :30].max(0) > 250).all()
        assert (picture[:, 32:] == 0).all()

    def test_long_sounds_are_cut(self):
        assert np.array_equal(spectrograms([tone(1000)], 8000), spectrograms([tone(1000, seconds=3)], 8000))

    def test_silence_is_black(self):
        assert (spectrograms([np.zeros(100), np.zeros(0)], 8000) == 0).all()

    def test_sounds_do_not_affect_each_other(self):
        sounds = [tone(300 + 20 * i) for i in range(70)]
        assert np.array_equal(spectrograms(sounds, 8000)[66], spectrograms(sounds[66:67], 8000)[0])

    def test_a_low_rate_is_refused(self):
        with pytest.raises(HoldfastError, match="6000 Hz hold nothing up to 4000 Hz"):
            spectrograms([tone(500, 6000)], 6000)


@pytest.fixture
def sounds(tmp_path):
    """24 tones, labelled by pitch and, as the speaker, by length."""
    made = [tone(500 * (1 + i % 3), seconds=0.2 + 0.1 * (i % 2)) * 1000 + i for i in range(24)]
    arrays = {
        "pcm": np.concatenate(made).astype(np.int16),
        "offsets": np.cumsum([0, *map(len, made)]),
        "y": np.arange(24) % 3,
        "speaker": np.arange(24) % 2,
        "speaker_names": np.array(["ann", "bob"]),
        "is_test": np.arange(24) % 4 == 3,
        "rate": np.array(8000),
    }

    def save(**changed):
        kept = {k: v for k, v in {**arrays, **changed}.items() if v is not None}
        np.savez(tmp_path / "tones.npz", **kept)
        return tmp_path / "tones.npz"

    return save


class TestArchive:
    def test_the_labels_are_chosen_by_target(self, sounds):
        path = sounds()
        pitch, speaker = load_task(str(path)), load_task(f"{path}@target=speaker")
        assert (pitch.name, pitch.class_names) == ("tones", ["0", "1", "2"])
        assert (speaker.name, speaker.class_names) == ("tones:speaker", ["ann", "bob"])
        assert pitch.input_shape == speaker.input_shape == (1, BANDS, WINDOWS)
        assert (pitch.size("train"), pitch.size("test")) == (18, 6)
        assert torch.equal(pitch._x["train"], speaker._x["train"])
        assert speaker._y["test"].tolist() == [1] * 6  # every fourth, and so of the same speaker

    def test_is_an_image_task_in_all_else(self, sounds):
        path = sounds()
        small = load_task(TaskSpec(data=f"{path}[0,2]", image_size=16))
        assert (small.input_shape, small.num_outputs) == ((1, 16, 16), 2)
        assert load_task(f"{path}@kind=denoising").kind == "denoising"
        load_model("cnn", load_task(str(path)))

    def test_without_a_split_one_is_drawn_by_the_seed(self, sounds):
        path = sounds(is_test=None)
        first, again, other = (load_task(TaskSpec(data=str(path), seed=s)) for s in (0, 0, 1))
        assert (first.size("train"), first.size("test")) == (18, 6)
        assert first.facts().sha256 == again.facts().sha256 != other.facts().sha256

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"rate": None}, "without `rate`"),
            ({"offsets": np.array([0, 10, 5, 20])}, "expected where each sound begins"),
            ({"offsets": np.array([0, 10, 10**9])}, "expected where each sound begins"),
            ({"offsets": np.array(3)}, "expected where each sound begins"),
            ({"is_test": np.zeros(5, bool)}, "is_test has shape"),
            ({"rate": np.array(4000)}, "hold nothing up to"),
        ],
    )
    def test_archives_that_do_not_fit_are_refused(self, sounds, changed, message):
        with pytest.raises(HoldfastError, match=message):
            load_task(str(sounds(**changed)))

    def test_an_unknown_label_is_named_beside_those_that_there_are(self, sounds):
        with pytest.raises(HoldfastError, match=r"labels of tones\.npz 'speakr': did you mean 'speaker'"):
            load_task(f"{sounds()}@target=speakr")


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        for name, frequency in (("high", 3000), ("low", 300)):
            (tmp_path / "voices" / name).mkdir(parents=True)
            for i in range(6):
                sound = (tone(frequency, seconds=0.1 * (i + 5)) * 2**14).astype(np.int16)
                wavfile.write(tmp_path / "voices" / name / f"{i}.wav", 8000, sound)
        return tmp_path / "voices"

    def test_is_read_as_grey_images(self, folder):
        task = load_task(str(folder))
        assert task.class_names == ["high", "low"]
        assert task.input_shape == (1, BANDS, WINDOWS)
        assert load_task(f"{folder}@channels=3,image_size=24").input_shape == (3, 24, 24)

    def test_wav_files_and_an_archive_give_the_same_task(self, folder):
        task = load_task(str(folder))
        picture = task._x["train"][task._y["train"] == 0][:1, 0].numpy()
        rates = [wavfile.read(p)[1] for p in sorted((folder / "high").glob("*.wav"))]
        assert any(np.array_equal(picture[0], each) for each in spectrograms(rates, 8000))

    def test_eight_bits_and_two_channels_are_the_same_sound(self, folder):
        sound = tone(300)
        wavfile.write(folder / "low" / "bits.wav", 8000, np.round(sound * 100 + 128).astype(np.uint8))
        wavfile.write(folder / "low" / "two.wav", 8000, np.stack([sound, sound], 1).astype(np.float32))
        from holdfast.tasks.audio import read_wav

        bits, two = (read_wav(folder / "low" / f"{n}.wav")[0].astype(int) for n in ("bits", "two"))
        assert (bits.argmax(0) == two.argmax(0)).all()
        assert np.abs(bits - two).max(1)[-5:].max() < 80  # a coarser noise floor, and the same tone

    def test_files_that_are_not_wav_are_refused(self, folder):
        (folder / "low" / "9.wav").write_bytes(b"RIFFnonsense")
        with pytest.raises(HoldfastError, match=r"9\.wav' cannot be read as a WAV file"):
            load_task(str(folder))


def test_halves_of_real_recordings_do_not_depend_on_labels(data_dir):
    """Both tasks use the same recordings: defender and adversary share none, even across tasks."""
    digits, speakers = (load_task(f"spoken_digits_8khz{t}", data_dir=data_dir) for t in ("", "@target=speaker"))
    assert (digits.size("train"), digits.size("test"), digits.num_outputs) == (894, 298, 10)
    assert speakers.class_names == ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
    for one, other in zip(halves(digits), halves(speakers), strict=True):
        assert torch.equal(one._x["train"], other._x["train"])
