"""Marks the tests that train something, which `make test-portable` runs; one that trains unmarked is an error.

A plugin, because examples in `src` and `docs` are tests as well, and train.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from _pytest.doctest import DoctestItem
from torch.optim.optimizer import register_optimizer_step_post_hook

FIXTURES = {"trained", "denoiser", "text_to_image", "zoo_originals", "brief_folder", "brief_result"}
"""Fixtures of conftest.py that train; a test that asks for one of them is marked."""

MODULES = {
    "test_harness",
    "test_language_audit",
    "test_adversaries",
    "test_any_model",
    "test_attack",
    "test_audit",
    "test_collapse",
    "test_collapse_language",
    "test_rir",
    "test_deep",
    "test_measurements",
    "test_defenses",
    "test_diffusion",
    "test_denoising",
    "test_domains",
    "test_executors",
    "test_training",
    "test_known_to_fail",
    "test_four_bits",
    "test_hf_causal",
    "test_hf_text",
    "test_leace",
    "test_linear_defenses",
    "test_ntl",
    "test_repnoise",
    "test_tar",
    "test_text_to_image_attacks",
    "test_samples",
    "test_runner",
    "test_activation_cache",
    "test_causal_paper",
    "test_protocol",
    "test_search",
    "test_zoo",
    "test_sophon",
    "test_batched",
    "test_linear_study",
    "test_distributed",
    "test_undo",
    "test_moves",
    "test_gradients",
    "test_mechanisms",
}
"""Modules of tests most of which train, here or in processes that they start: all of their tests are marked."""

EXAMPLES = ("pretrain(", "immunize(", "audit(", "attack(", "finetune(", "run_recipe(")
"""An example that calls one of these is marked."""


class Steps:
    """Counts steps of all optimizers."""

    def __init__(self) -> None:
        self.count = 0
        self.fixtures: set[Any] = set()
        register_optimizer_step_post_hook(lambda *_: self.add())

    def add(self) -> None:
        self.count += 1


STEPS = Steps()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        example = isinstance(item, DoctestItem) and any(
            call in line.source for line in item.dtest.examples for call in EXAMPLES
        )
        if names & FIXTURES or item.path.stem in MODULES or example:
            item.add_marker("trains")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Iterator[None]:
    before = STEPS.count
    try:
        return (yield)
    finally:
        if STEPS.count > before:
            STEPS.fixtures.add(fixturedef)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = STEPS.count
    result = yield
    if (STEPS.count > before or _fixtures(item) & STEPS.fixtures) and not item.get_closest_marker("trains"):
        pytest.fail(
            "It trains something: mark it @pytest.mark.trains, or add its module or fixture to tests/training.py.",
            pytrace=False,
        )
    return result


def _fixtures(item: pytest.Item) -> set[Any]:
    if not isinstance(item, pytest.Function | DoctestItem):
        return set()
    return {each for found in item._fixtureinfo.name2fixturedefs.values() for each in found}
