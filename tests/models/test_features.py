from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.adversaries import BATTERIES
from holdfast.defenses import FrontierDefense
from holdfast.metrics.feasibility import assess
from holdfast.models import SplitModel, both_splits, feature_batches, features
from holdfast.models.features import BATCH, KEPT, FeatureCache, size_of


@pytest.fixture(autouse=True)
def empty():
    KEPT.clear()
    yield
    KEPT.clear()


def pair(numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(numbers), torch.zeros(0)


class TestCache:
    def test_the_longest_unused_goes_first(self):
        cache = FeatureCache(limit=120)
        for name in "abc":
            cache.put((name,), pair(10))
        assert cache.get(("a",)) is not None  # used again, so that b is next to go
        cache.put(("d",), pair(10))
        assert [cache.get((name,)) is not None for name in "abcd"] == [True, False, True, True]
        assert (cache.hits, cache.misses, cache.bytes) == (4, 1, 120)

    def test_a_too_large_entry_is_not_kept_and_drops_no_other(self):
        cache = FeatureCache(limit=40)
        cache.put(("small",), pair(10))
        cache.put(("large",), pair(11))
        assert cache.get(("large",)) is None
        assert cache.get(("small",)) is not None

    def test_the_same_key_is_counted_once(self):
        cache = FeatureCache(limit=100)
        for _ in range(3):
            cache.put(("a",), pair(20))
        assert cache.bytes == 80


class TestFeatures:
    def test_the_network_runs_once(self, trained, benign):
        x, y = features(trained, benign, "train")
        again = features(trained.clone(), benign, "train")
        assert again[0] is x
        assert again[1] is y
        assert (KEPT.hits, KEPT.misses) == (1, 1)

    def test_both_splits_are_those_of_each_and_the_key_is_asked_for_once(self, trained, benign, monkeypatch):
        train, test = features(trained, benign, "train")[0], features(trained, benign, "test")[0]
        hashed, honest = [], SplitModel.facts
        monkeypatch.setattr(SplitModel, "facts", lambda self, *more: hashed.append(self) or honest(self, *more))
        found = both_splits(trained, benign)
        assert found[0] is train
        assert found[1] is test
        assert hashed == [trained]

    def test_batches_are_the_same_kept_or_not(self, trained, benign):
        first = list(feature_batches(trained, benign, "train"))
        second = list(feature_batches(trained, benign, "train"))
        assert (KEPT.hits, KEPT.misses) == (1, 1)
        assert [len(x) for x, _ in first] == [len(x) for x, _ in second] == [BATCH, benign.size("train") - BATCH]
        for here, there in zip(first, second, strict=True):
            assert all(map(torch.equal, here, there))
        assert torch.equal(torch.cat([x for x, _ in first]), features(trained, benign, "train")[0])

    def test_another_split_task_or_weight_is_a_miss(self, trained, benign, restricted):
        other = trained.clone()
        with torch.no_grad():
            next(iter(other.parameters())).add_(1e-3)
        for model, task, split in (
            (trained, benign, "train"), (trained, benign, "test"), (trained, restricted, "train"),
            (other, benign, "train"),
        ):  # fmt: skip
            features(model, task, split)
        assert (KEPT.hits, KEPT.misses) == (0, 4)

    def test_so_is_the_same_weight_in_a_network_that_computes_something_else(self, benign):
        def network(activation: nn.Module) -> SplitModel:
            torch.manual_seed(0)
            layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), activation, nn.Linear(8, 5))
            return SplitModel(layers, "3")

        one, other = network(nn.ReLU()), network(nn.Tanh())
        assert one.facts().sha256 == other.facts().sha256
        assert not torch.equal(features(one, benign, "test")[0], features(other, benign, "test")[0])
        assert KEPT.misses == 2

    def test_features_above_the_limit_are_computed_and_not_kept(self, trained, benign, monkeypatch):
        whole = features(trained, benign, "train")
        KEPT.clear()
        monkeypatch.setattr(KEPT, "limit", size_of(whole) - 1)
        for _ in range(2):
            x, _ = zip(*feature_batches(trained, benign, "train"), strict=True)
            assert torch.equal(torch.cat(x), whole[0])
            assert torch.equal(features(trained, benign, "train")[0], whole[0])
        assert (KEPT.hits, KEPT.misses, KEPT.bytes) == (0, 4, 0)

    def test_a_model_in_training_mode_stays_there_and_its_statistics_too(self, trained, benign):
        model = trained.clone().train()
        before = {n: v.clone() for n, v in model.network.state_dict().items()}
        features(model, benign, "train")
        assert model.training
        assert all(torch.equal(v, before[n]) for n, v in model.network.state_dict().items())


class TestWhoUsesIt:
    def test_all_probes_of_a_battery_share_features(self, trained, benign, run):
        for adversary in BATTERIES["probes-v1"][:3]:
            adversary.attack(trained, benign, budgets=[0, 1], run=run)
        assert (KEPT.hits, KEPT.misses) == (4, 2)

    def test_a_feasibility_study_runs_the_network_once_a_task(self, trained, benign, restricted):
        assess(trained, benign, restricted)
        assert (KEPT.hits, KEPT.misses) == (2, 2)

    def test_a_linear_defense_reuses_features_of_the_study(self, trained, benign, restricted, run):
        assess(trained, benign, restricted)
        KEPT.hits = KEPT.misses = 0
        FrontierDefense().immunize(trained, benign, restricted, run=run)
        assert (KEPT.hits, KEPT.misses) == (2, 0)
