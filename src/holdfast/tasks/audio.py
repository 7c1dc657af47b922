"""Sounds as images: log-mel spectrograms of one second, uint8, for any network that takes grey images.

This is the usual front end of speech recognition. Power spectra of windows of 32 ms, one every 16 ms, are summed in 40
triangular bands that are equally wide on the mel scale, m(f) = 2595 log10(1 + f / 700), from 0 to 4000 Hz, and the
logarithm is taken. 255 is the loudest point of a sound and 0 is 80 dB below, whatever the recording's loudness. Windows
have a length in time, not in samples, and no band is above 4000 Hz, so that recordings at any rate from 8 kHz give the
same image.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.arrays import UNREADABLE, Array
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.splits import draw_test_rows

WINDOW, HOP = 0.032, 0.016
WINDOWS, BANDS = 61, 40
TOP = 4000.0
RANGE = 80.0
SECOND = WINDOW + (WINDOWS - 1) * HOP
"""The part of a sound that is used, in seconds: all windows together."""


def spectrograms(sounds: Sequence[Array], rate: int) -> Array:
    """Returns the spectrograms of sounds.

    Args:
        sounds: N of them, each of shape (T,) and any number type; longer ones are cut off after the last window, at a
            second, and shorter ones are filled up with silence.
        rate: samples a second, at least 8000.

    Returns:
        Shape (N, 40, 61), uint8: bands, the highest first, and windows. Silence is all 0.

    Raises:
        HoldfastError: for a lower rate.

    Example:
        >>> tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000)
        >>> picture = spectrograms([tone], 8000)[0]
        >>> picture.shape, int(picture.max()), int(picture[:, 30].argmax())  # 1000 mel of 2146
        ((40, 61), 255, 21)
    """
    from scipy.signal import get_window  # slow to import, and most tasks hold no sounds

    if rate < 2 * TOP:
        raise HoldfastError(f"Sounds of {rate} Hz hold nothing up to {TOP:.0f} Hz; expected at least {2 * TOP:.0f} Hz.")
    window, hop = round(WINDOW * rate), round(HOP * rate)
    heard = np.zeros((len(sounds), window + (WINDOWS - 1) * hop))
    for row, sound in zip(heard, sounds, strict=True):
        row[: len(sound)] = sound[: len(row)]
    points = 2 * window  # zeros double each window: otherwise low bands are narrower than a point
    weights, shape = _bands(points, rate), get_window("hann", window)
    return np.concatenate([_images(part, weights, shape, hop) for part in np.split(heard, range(64, len(heard), 64))])


def _images(heard: Array, weights: Array, shape: Array, hop: int) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(heard, len(shape), axis=-1)[:, ::hop]
    power = np.abs(np.fft.rfft(windows * shape, 2 * len(shape))) ** 2
    bands = (power @ weights.T).swapaxes(1, 2)
    loudest = bands.max((1, 2), keepdims=True)
    floor = 10 ** (-RANGE / 10)
    decibels = 10 * np.log10(np.maximum(bands / np.where(loudest > 0, loudest, 1), floor))
    return np.asarray(np.round(255 * (1 + decibels / RANGE)).astype(np.uint8)[:, ::-1])


def _bands(points: int, rate: int) -> Array:
    """Weights of the bands: shape (40, points / 2 + 1), triangles between neighbouring centres."""
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + TOP / 700), BANDS + 2) / 2595) - 1)
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    f = np.fft.rfftfreq(points, 1 / rate)
    return np.clip(np.minimum((f - low) / (centre - low), (high - f) / (high - centre)), 0, None)


def load_sounds(
    path: Path,
    target: str | None = None,
    *,
    test_fraction: float = 0.25,
    seed: int = 0,
    kind: type[ArrayTask] = ArrayTask,
) -> ArrayTask:
    """Reads an `.npz` of sounds: `pcm`, all of them in a row, and `offsets`, where each begins and the last one ends.

    `rate` is in Hz. Labels are any array of one integer a sound; `NAME_names` may name the classes of `NAME`, and
    `class_names` those of `y`. `is_test` sets the split; otherwise `test_fraction` of every class is drawn by `seed`.

    Args:
        path: the file.
        target: the array of labels; None: `y`.
        test_fraction: share of the sounds to test on, in (0, 1).
        seed: of the split.
        kind: of the task.

    Raises:
        HoldfastError: if an array is missing, or its shape does not fit the sounds.
    """
    arrays = _sounds_of(path)
    pcm, offsets, rate = arrays["pcm"], arrays["offsets"], int(arrays["rate"].reshape(()))
    count, name = len(offsets) - 1, target or "y"
    labels = {k for k, v in arrays.items() if v.shape == (count,) and v.dtype.kind in "ui" and k != "offsets"}
    if name not in labels:
        raise unknown(f"labels of {path.name}", name, sorted(labels))
    y = arrays[name].astype(np.int64)
    named = arrays.get(f"{name}_names", arrays.get("class_names") if name == "y" else None)
    test = arrays["is_test"].astype(bool) if "is_test" in arrays else draw_test_rows(path, y, test_fraction, seed)
    if test.shape != (count,):
        raise HoldfastError(f"{str(path)!r}: is_test has shape {test.shape}; expected one for each of {count} sounds.")
    x = spectrograms([pcm[a:b] for a, b in pairwise(offsets)], rate)
    title = path.stem if target is None else f"{path.stem}:{target}"
    names = None if named is None else [str(n).strip() for n in named]
    task = kind(title, x[~test], y[~test], x[test], y[test], names)
    lengths = np.diff(offsets) / rate
    cut, filled = int((lengths > SECOND).sum()), int((lengths < SECOND).sum())
    notes = [f"{cut} sounds are longer than {SECOND:.2f} s and were cut off"] if cut else []
    notes += [f"{filled} sounds are shorter than {SECOND:.2f} s and were filled up with silence"] if filled else []
    return task.noted(f"file {path}", *notes, drawn="is_test" not in arrays)


def _sounds_of(path: Path) -> dict[str, Array]:
    """The arrays of an `.npz` of sounds, with `pcm`, `offsets` and `rate` checked."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except UNREADABLE as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as an .npz of plain arrays: {error}.") from error
    if "rate" not in arrays:
        raise HoldfastError(f"{str(path)!r} holds sounds (pcm, offsets) without `rate`, their samples a second.")
    pcm, offsets, rates = arrays["pcm"], arrays["offsets"], arrays["rate"]
    if rates.size != 1 or rates.dtype.kind not in "uif" or not 1 <= float(rates.reshape(())) < 1e9:
        raise HoldfastError(f"{str(path)!r}: rate is {rates.tolist()}; expected one number, samples a second.")
    if pcm.ndim != 1 or pcm.dtype.kind not in "uif" or offsets.dtype.kind not in "ui":
        raise HoldfastError(
            f"{str(path)!r}: pcm is {pcm.dtype} of shape {pcm.shape}, offsets {offsets.dtype}; expected all sounds in "
            "one row of numbers, and whole numbers for where they begin."
        )
    arrays["offsets"] = offsets = offsets.astype(np.int64)  # differences of unsigned numbers are never below 0
    if (
        offsets.ndim != 1
        or len(offsets) < 3
        or offsets[0] < 0
        or (np.diff(offsets) < 1).any()
        or offsets[-1] > len(pcm)
    ):
        raise HoldfastError(
            f"{str(path)!r}: offsets has shape {offsets.shape}, and pcm {pcm.shape}; expected where each sound begins, "
            "ascending, and finally where the last one ends."
        )
    return arrays


def is_sounds(path: Path) -> bool:
    """Whether an `.npz` holds sounds; False for any other file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {"pcm", "offsets"} <= set(archive.files)
    except (*UNREADABLE, AttributeError, TypeError):  # a single array is not an archive
        return False


def read_wav(path: Path) -> tuple[Array, float]:
    """Returns the spectrogram of a `.wav` file and its length in seconds; several channels become one.

    Raises:
        HoldfastError: if it is not a WAV file, is empty, has a rate below 8000 Hz, or holds values that are not finite.
    """
    from scipy.io import wavfile  # slow to import, and most tasks hold no sounds

    try:
        rate, sound = wavfile.read(path)
    except (ValueError, OSError, EOFError, struct.error) as error:
        raise HoldfastError(f"{str(path)!r} cannot be read as a WAV file: {error}.") from error
    centred = sound - 128.0 if sound.dtype == np.uint8 else sound  # only 8-bit WAV is unsigned
    if not len(sound) or not np.isfinite(centred).all():
        problem = "holds values that are not finite" if len(sound) else "holds no samples"
        raise HoldfastError(f"{str(path)!r} {problem}; correct or remove it.")
    try:
        (picture,) = spectrograms([centred if sound.ndim == 1 else centred.mean(1)], int(rate))
    except HoldfastError as error:
        raise HoldfastError(f"{str(path)!r}: {error}") from error
    return np.asarray(picture), len(sound) / rate
