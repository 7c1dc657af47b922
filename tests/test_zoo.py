"""The zoo is worth something only if its members are as good as the original, look resistant, and fall to an answer."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from conftest import once
from holdfast.adversaries import DirectionalAblation
from holdfast.runtime.run import Run
from zoo import SETTINGS, ZOO, case
from zoo.collapse import COLLAPSING
from zoo.language import LANGUAGE
from zoo.measure import best, measure
from zoo.settings import CPU, QUICK

BRIEF = tuple(QUICK[i] for i in (2, 6, 7))
"""Of the quick battery what is the best on some original, and the released head."""
ADVANTAGE = QUICK[6:7]
COLLAPSE = (*COLLAPSING, *LANGUAGE)
"""Those have tests of their own."""


def brief(sham):
    """Few of the plain attacks, as `benchmarks/zoo.py` has all of them, with more seeds."""
    if sham.plain is QUICK:
        return BRIEF
    return sham.plain if sham.domain == "vision" else sham.plain[-1:]


def seeds(sham):
    """One where a gate stops everything, or both of two attacks; else two, as an attack varies on the original too.

    Two for an ablation as well, which depends on the samples that it takes means of.
    """
    if isinstance(sham.answer, DirectionalAblation):
        return 2
    return 2 if sham.domain == "vision" and sham.plain is not QUICK and len(sham.plain) != 2 else 1


def late(setting):
    """The budgets at which attacks on digits are at their best, as scores take as long as some steps; else all."""
    found = SETTINGS[setting]
    return found.budgets[-2:] if found.domain == "vision" else found.budgets


@cache
def on_original(setting, plain, count):
    return best(plain, SETTINGS[setting].original, SETTINGS[setting], count, late(setting))


@pytest.fixture(scope="session")
def original_of(zoo_originals, denoiser, tmp_path_factory):
    """Gives the original of a setting, which one of the workers trains."""

    def given(name):
        setting = SETTINGS[name]
        if "original" not in vars(setting):
            setting.original = once(tmp_path_factory, f"zoo-{name}", lambda: setting.original)
        return setting.original

    return given


@pytest.mark.parametrize("name", [name for name in ZOO if name not in COLLAPSE])
def test_a_sham_is_as_good_looks_resistant_and_falls_to_its_answer(name, original_of):
    sham = ZOO[name]
    plain, count = brief(sham), seeds(sham)
    before = original_of(sham.setting).facts().sha256
    found = measure(case(name), on_original(sham.setting, plain, count), count, plain, late(sham.setting))
    assert found.benign[1] > found.benign[0] - 0.04
    assert found.lost > 0.09
    assert found.share > 0.6
    assert original_of(sham.setting).facts().sha256 == before


def test_the_zoo_is_large_and_for_every_domain():
    counts = Counter(sham.domain for sham in ZOO.values())
    assert sum(counts.values()) >= 60
    assert set(counts) == {"vision", "language", "denoising"}
    assert len({sham.mechanism for sham in ZOO.values()}) == len(ZOO)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_there_is_an_advantage_to_pretend_away(norm, zoo_originals):
    setting, run = SETTINGS[norm], Run(seed=0, device=CPU)
    with run.seeded("scratch"):
        fresh = setting.original.fresh()
    own, scratch = (best(ADVANTAGE, model, setting, seeds=3).score for model in (setting.original, fresh))
    assert own > scratch + 0.08
