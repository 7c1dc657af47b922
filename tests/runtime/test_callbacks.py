"""Callbacks are told what happened now, in order; trackers log it."""

from __future__ import annotations

import importlib.util

import pytest

import holdfast
from holdfast.errors import HoldfastError
from holdfast.results import Curve
from holdfast.runtime.callbacks import TRACKERS, Callback, Tracker


class Listener(Callback):
    def __init__(self):
        self.rounds, self.curves = [], []

    def on_round(self, defense, round, values):
        self.rounds.append((defense, round, dict(values)))

    def on_trial(self, curve):
        self.curves.append(curve)


@pytest.mark.trains
def test_every_round_of_a_defense_is_told(trained, benign, restricted):
    listener = Listener()
    model = holdfast.immunize(
        trained, benign=benign, restricted=restricted, iterations=3, guard_every=2, steps=1,
        callbacks=[listener],
    )  # fmt: skip
    assert [(name, n) for name, n, _ in listener.rounds] == [("sophon", 1), ("sophon", 2), ("sophon", 3)]
    history = model.immunization.history
    for name, n, values in listener.rounds:
        assert values["suppression_loss"] == history["suppression_loss"][n - 1], name


@pytest.mark.trains
def test_trials_are_told_once_and_not_when_they_were_done_before(trained, benign, restricted, tmp_path):
    settings = {
        "original": trained, "benign": benign, "restricted": restricted, "budgets": (0, 2), "seeds": 1, "shots": 2,
        "side_effects": False, "folder": tmp_path,
    }  # fmt: skip
    listener, again = Listener(), Listener()
    result = holdfast.audit(trained, **settings, callbacks=[listener])
    assert sorted(map(repr, listener.curves)) == sorted(map(repr, result.curves))
    holdfast.audit(trained, **settings, callbacks=[again])
    assert again.curves == []


class TestTrackers:
    def test_unknown(self, tmp_path):
        with pytest.raises(HoldfastError, match="Unknown tracker 'tensorbord': did you mean 'tensorboard'"):
            Tracker("tensorbord", "run", tmp_path)

    def test_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        for name in TRACKERS:
            with pytest.raises(HoldfastError, match=f"pip install {name}"):
                Tracker(name, "run", tmp_path)

    def test_tensorboard(self, tmp_path):
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        none = [None, None]
        curve = Curve(
            adversary="all", role="original", seed=0, budgets=[0, 5], scores=[0.1, 0.75], losses=none, folds=none,
            batch_size=2,
        )  # fmt: skip
        with Tracker("tensorboard", "run", tmp_path) as tracker:
            for n, loss in enumerate((0.5, 0.25), 1):
                tracker.on_round("sophon", n, {"suppression_loss": loss})
            tracker.on_trial(curve)
        found = events.EventAccumulator(str(tmp_path / "run")).Reload()
        assert [(e.step, e.value) for e in found.Scalars("sophon/suppression_loss")] == [(1, 0.5), (2, 0.25)]
        assert [(e.step, e.value) for e in found.Scalars("original/all")] == [(1, 0.75)]
