"""Adversaries, batteries and undo moves of another package, found by their entry points."""

from __future__ import annotations

import sys

import pytest

import holdfast
from holdfast.adversaries import (
    BATTERIES,
    KINDS,
    SEARCHES,
    UNDO,
    Adversary,
    FineTuning,
    Probe,
    Search,
    battery,
    battery_config,
    battery_name,
    build,
    list_adversaries,
    list_batteries,
    register_battery,
    undo_move,
)
from holdfast.errors import HoldfastError
from holdfast.experiments.replay import replay
from holdfast.training import Strategy
from plugins import HEAD_DESCENT


@pytest.fixture
def registries(monkeypatch):
    """Copies of the registries, which look for entry points anew; what a test registers is forgotten after it."""
    for registry in (KINDS, BATTERIES, SEARCHES, UNDO):
        monkeypatch.setattr(registry, "_members", dict(registry.items()))
        monkeypatch.setattr(registry, "_loaded", False)


@pytest.fixture
def package(tmp_path, monkeypatch, registries):
    """An installed package that declares its module for adversaries and for undo moves."""
    (tmp_path / "descent.py").write_text(HEAD_DESCENT)
    info = tmp_path / "descent-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: descent\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[holdfast.adversaries]\ndescent = descent\n[holdfast.adversaries.undo]\ndescent = descent\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("descent", None)


def test_what_holdfast_has():
    assert list_adversaries() == [
        "directional-ablation", "dreambooth", "few-shot-prompt", "finetuning", "probe", "textual-inversion",
        "unlabelled",
    ]  # fmt: skip
    assert set(list_batteries()) == {*BATTERIES, *SEARCHES} >= {"quick-v1", "standard-v1", "adaptive-v1"}
    assert len(UNDO) == 31


@pytest.mark.trains
def test_another_packages_battery_is_audited_and_replayed(package, trained, benign, restricted, tmp_path):
    assert "head-descent" in list_adversaries()
    assert "descent-v1" in list_batteries()
    path = str(tmp_path / "model.safetensors")
    trained.save(path)
    result = holdfast.audit(
        trained, original=trained, benign=benign, restricted=restricted, battery="descent-v1",
        folder=tmp_path / "audit",
        budgets=(0, 5), seeds=1, shots=3, side_effects=False, threads=1, device="cpu",
        source={"model": path, "original": path, "benign": "digits[0-4]", "restricted": "digits[5-9]"},
    )  # fmt: skip
    assert result.battery == "descent-v1"
    assert result.adversaries["head descent"] == {"kind": "head-descent", "rate": 0.5, "name": "head descent"}
    for name in result.adversaries:
        again = replay(tmp_path / "audit", adversary=name)
        assert again.recorded.scores == again.repeated.scores, name
        assert len(set(again.repeated.scores)) == 2, name  # it has learned, or unlearned, something


def test_another_packages_undo_move_changes_what_fine_tuning_starts_from(package, trained, benign, run):
    start = Strategy("direct", "all", "sgd", 0.05, 10)
    scores = [
        FineTuning(start, undo=u).attack(trained, benign, budgets=(0,), run=run).scores for u in ((), ("negate",))
    ]
    assert scores[1][0] < scores[0][0] - 0.5
    assert build({"kind": "finetuning", "undo": ["negate"]}).undo == ("negate",)


def test_a_search_does_not_change_with_new_moves(package):
    before = SEARCHES["adaptive-v1"].config()
    assert "negate" in UNDO
    assert SEARCHES["adaptive-v1"].config() == before
    assert "negate" not in before["space"]["first"]


class TestNames:
    def test_are_unique(self, registries):
        def thaw(model, reference, task, generator, device): ...

        with pytest.raises(HoldfastError, match="'thaw'"):
            undo_move("thaw")(thaw)
        with pytest.raises(HoldfastError, match="'quick-v1'"):
            register_battery("quick-v1", [Probe()])
        with pytest.raises(HoldfastError, match="'probe'"):
            KINDS.register("probe")(FineTuning)

    def test_of_lists_are_custom(self, registries):
        with pytest.raises(HoldfastError, match="choose another name"):
            register_battery("custom", [Probe()])


class TestALargerChoiceOfBatteries:
    def test_adversaries_as_they_are(self):
        own = [Probe("ridge"), FineTuning(Strategy("head"))]
        assert battery(own) == tuple(own)
        assert battery_name(own) == "custom"
        assert battery_config(battery(own)) == {a.name: a.config() for a in own}

    def test_by_name(self):
        assert battery_name("quick-v1") == "quick-v1"
        assert battery_config(battery("adaptive-v1"))["kind"] == "search"
        assert isinstance(battery("adaptive-v1"), Search)

    @pytest.mark.parametrize(
        ("which", "message"),
        [
            ([], "empty; give at least one"),
            ([Probe(), "quick-v1"], "Entry 1 of the battery 'custom' is 'quick-v1'; expected an adversary"),
            ([Probe], "Entry 0 .* expected an adversary"),
            ([Probe(), Probe("ridge", name=Probe().name)], "Two adversaries .* are called 'probe line-search raw'"),
            (Probe(), "is of type Probe; expected the name of a battery .*quick-v1.* or a list"),
        ],
    )
    def test_refuses(self, which, message):
        with pytest.raises(HoldfastError, match=message):
            battery(which)


def test_settings_of_a_dataclass_are_its_fields(package):
    made = build({"kind": "head-descent", "rate": 0.3})
    assert (made.rate, made.config()["rate"]) == (0.3, 0.3)
    with pytest.raises(HoldfastError, match="did you mean 'rate'"):
        build({"kind": "head-descent", "rat": 0.3})


def test_a_class_that_says_nothing_of_its_settings_cannot_be_built(registries):
    @KINDS.register("plain")
    class Plain(Adversary):
        name, batch_size = "plain", 1

        def config(self):
            return {"kind": "plain"}

        def run(self, model, task, *, benign, generator, device):
            yield

    with pytest.raises(HoldfastError, match="give the class a `from_config`"):
        build({"kind": "plain"})
