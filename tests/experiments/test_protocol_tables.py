"""What is shown of a protocol: tables, figures and sentences on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from holdfast.experiments.immunization import ImmunizedModel
from holdfast.experiments.setting_scores import Measure, PaperSpec, Row, SettingScores
from holdfast.experiments.tables import tabulate
from holdfast.results import Curve, ImmunizationResult


def rows(outcome, name, key):
    return {row[key]: row for row in outcome.tables[name].rows}


def curve(attack, role, seed, scores):
    return Curve(
        adversary=attack, role=role, seed=seed, budgets=[0, 5, 10][: len(scores)], scores=scores,
        losses=[None, 0.1, 0.1], folds=[[s, s, s, s] for s in scores], batch_size=5,
    )  # fmt: skip


def scene(**changes):
    defaults = {
        "name": "x", "restricted": "r", "measure": Measure("accuracy"),
        "benign_measure": Measure("accuracy"), "chance": 0.1, "original": 0.95, "made": {}, "paper": {},
        "stands_for": None,
    }  # fmt: skip
    return SettingScores(**{**defaults, **changes})


def made(losses=(0.5, 2.0, 1.0), benign=0.9, **changes):
    history = {"iteration": [1, 2, 3], "suppression_loss": list(losses), "benign_score": [None, 0.9, None]}
    defaults = {"defense": "sophon", "config": {}, "history": history, "events": [], "completed": True}
    return ImmunizedModel(None, ImmunizationResult(**{**defaults, **changes}), benign, 1.0, None)


class TestTabulate:
    """On numbers that can be checked by hand."""

    def outcome(self, chance=0.1):
        scores = {
            ("scratch", "scratch", "A / B"): [[0.1, 0.2, 0.4], [0.1, 0.3, 0.5]],
            ("original", "original", "A"): [[0.1, 0.6, 0.7], [0.1, 0.6, 0.9]],
            ("original", "original", "B"): [[0.1, 0.5, 0.5], [0.1, 0.5, 0.5]],
            ("D", "immunized", "A"): [[0.1, 0.1, 0.2], [0.1, 0.2, 0.2]],
            ("D", "immunized", "B"): [[0.1, 0.4, 0.3], [0.1, 0.3, 0.3]],
        }
        lines = [
            Row(
                "x", model, attack, ("A", "B") if model == "scratch" else (attack,), (attack,), (0, 1, 2), 5,
                curves=tuple(curve("spelled", role, s, v) for s, v in enumerate(seeds)),
            )
            for (model, role, attack), seeds in scores.items()
        ]  # fmt: skip
        own = {("D", 0): made(), ("D", 1): made(benign=0.8)}
        return tabulate([scene(made=own, chance=chance)], lines, (0, 1, 2))

    def test_a_score_below_chance_is_explained(self):
        assert not any("Below chance" in finding for finding in self.outcome().findings)
        _, defended, *_ = self.outcome(chance=0.25).findings
        assert "Below chance (25.0%) after A: the model avoids the right answers" in defended

    def test_where_the_original_is_as_low_nothing_is_made_of_it(self):
        lines = [
            Row("x", m, "A", ("A",), ("A",), (0, 1, 2), 5, curves=(curve("A", role, 0, [0.1, 0.2, 0.2]),))
            for m, role in (("scratch", "scratch"), ("original", "original"), ("D", "immunized"))
        ]
        found = tabulate([scene(made={("D", 0): made()}, chance=0.3)], lines, (0, 1, 2))
        assert not any("Below chance" in finding for finding in found.findings)

    def test_best_attack_at_this_epoch_or_before(self):
        best = rows(self.outcome(), "best", "model")
        assert best["original"]["attack"] == "A"
        assert best["D"]["attack"] == "B"
        assert [best["D"][f"epoch {e}"].mean for e in (0, 1, 2)] == pytest.approx([0.1, 0.35, 0.35])
        assert best["D"]["benign drop"].mean == pytest.approx(0.1)
        assert best["D"]["benign drop"].sd == pytest.approx(0.05 * 2**0.5)

    def test_advantage_seed_by_seed_with_its_standard_error(self):
        advantage = rows(self.outcome(), "advantage", "model")
        assert list(advantage) == ["original", "D"]
        last = advantage["D"]["epoch 2"]  # stopped at epoch 1: 0.4 - 0.4, and 0.3 - 0.5
        assert last.mean == pytest.approx(-0.1)
        assert last.standard_error == pytest.approx(0.1)
        assert advantage["D"]["area"].mean == pytest.approx((0.2 + 0.0 + 0.0 - 0.2) / 4)
        assert self.outcome().tables["advantage"].standard_error

    def test_trade_off_of_each_immunized_model(self):
        original, first, second = self.outcome().tables["trade_off"].rows
        assert (original["model"], original["seed"], original["benign drop"].n) == ("original", "", 0)
        assert original["advantage"].mean == pytest.approx((0.4 + 0.3 + 0.3 + 0.4) / 4)
        assert [(row["model"], row["seed"], row["advantage"].n) for row in (first, second)] == [
            ("D", "0", 1),
            ("D", "1", 1),
        ]
        assert [row["benign drop"].mean for row in (first, second)] == pytest.approx([0.05, 0.15])
        assert [row["advantage"].mean for row in (first, second)] == pytest.approx([(0.2 + 0.0) / 2, (0.0 - 0.2) / 2])

    def test_difference_seed_by_seed(self):
        scores = {
            ("scratch", "scratch"): [[0.1, 0.2, 0.4], [0.1, 0.3, 0.5]],
            ("D", "immunized"): [[0.1, 0.4, 0.5], [0.1, 0.6, 0.7]],
            ("E", "immunized"): [[0.1, 0.3, 0.4], [0.1, 0.4, 0.5]],
        }
        lines = [
            Row("x", model, "A", ("A",), ("A",), (0, 1, 2), 5,
                curves=tuple(curve("spelled", role, s, v) for s, v in enumerate(seeds)))
            for (model, role), seeds in scores.items()
        ]  # fmt: skip
        own = {("D", 0): made(benign=0.9), ("E", 0): made(benign=0.85)}
        found = tabulate([scene(made=own)], lines, (0, 1, 2), "D")
        ((key, row),) = rows(found, "difference", "model").items()
        assert key == "E"
        assert (row["epoch 1"].mean, row["epoch 2"].mean) == (pytest.approx(-0.15), pytest.approx(-0.15))
        assert row["area"].mean == pytest.approx(-0.15)
        assert row["area"].standard_error == pytest.approx(0.05)
        assert row["benign"].mean == pytest.approx(-0.05)

    def test_sentences(self):
        original, defended, crossing, jump = self.outcome().findings
        assert crossing == (
            "By mean over seeds, fine-tuning D is at least as good as training from scratch at epoch 1 (35.0% against "
            "25.0%), but not at every later one."
        )
        assert "best attack on the original is at 80.0%, from scratch at 45.0%; chance is 10.0%" in original
        assert "D under its best attack, B, is at 35.0%: -10.0 ± 10.0 points over scratch" in defended
        assert "2 of 2 attacks end no higher than the same from scratch" in defended
        assert "was 95.0% before, and is 85.0%" in defended
        assert "largest jump of its suppression loss between two rounds is 1.5" in jump

    def test_what_is_not_finite_is_said_and_is_no_number(self):
        lost = made(losses=(0.5, None, 1.0), completed=False)
        own = curve("A", "immunized", 0, [0.1, 0.2, 0.3])
        lines = [Row("x", "D", "A", ("A",), ("A",), (0, 1, 2), 5, curves=(own,))]
        found = tabulate([scene(made={("D", 0): lost})], lines, (0, 1, 2))
        row = rows(found, "immunization", "defense")["D"]
        assert (row["ended"], row["non-finite from"].mean, row["largest jump"].mean) == ("gave up", 2, None)
        assert "D: in 1 of 1 seeds a loss was not finite (round 2)." in found.findings
        assert any("did not complete with seed 0" in f for f in found.findings)
        assert found.tables["advantage"].rows == []  # nothing was trained from scratch

    def test_an_original_without_advantage_is_said(self):
        lines = [
            Row("x", m, "A", ("A",), ("A",), (0, 1, 2), 5, curves=(curve("A", m, 0, [0.1, 0.2, s]),))
            for m, s in (("scratch", 0.5), ("original", 0.4))
        ]
        assert "there is nothing to protect" in tabulate([scene()], lines, (0, 1, 2)).findings[0]

    def test_another_setting_of_the_paper_is_named(self):
        other = scene(paper={"original": PaperSpec(benign=99.6)}, stands_for="ImageNette to CIFAR-10")
        own = curve("A", "original", 0, [0.1, 0.1, 0.1])
        lines = [Row("x", "original", "A", ("A",), ("A",), (0, 1, 2), 5, curves=(own,))]
        table = tabulate([other], lines, (0, 1, 2)).tables["accuracy"]
        assert "here stands x for its ImageNette to CIFAR-10" in table.note
        assert table.rows[0]["benign"].paper == pytest.approx(0.996)

    @pytest.mark.parametrize(
        ("scratch", "own", "said"),
        [
            ([0.1, 0.5, 0.6], [0.1, 0.2, 0.3], "at no epoch above 0 as good as training from scratch."),
            ([0.1, 0.5, 0.6], [0.9, 0.2, 0.3], "from epoch 1 on (90.0% against 50.0% there)."),  # an adversary may stop
            ([0.1, 0.5, 0.6], [0.1, 0.4, 0.6], "from epoch 2 on (60.0% against 60.0% there)."),
            ([0.1, 0.5, 0.6], [0.1, 0.5, 0.9], "from epoch 1 on (50.0% against 50.0% there)."),
            ([0.1, 0.5, 0.6], [0.1, 0.5, 0.5], "at epoch 1 (50.0% against 50.0%), but not at every later one."),
        ],
    )
    def test_from_which_epoch_on_it_is_a_better_start(self, scratch, own, said):
        lines = [
            Row("x", m, "A", ("A",), ("A",), (0, 1, 2), 5, curves=(curve("A", role, 0, scores),))
            for m, role, scores in (("scratch", "scratch", scratch), ("D", "immunized", own))
        ]
        (crossing,) = [
            f for f in tabulate([scene(made={("D", 0): made()})], lines, (0, 1, 2)).findings if "By mean" in f
        ]
        assert crossing.startswith("By mean over seeds, fine-tuning D is ")
        assert crossing.endswith(said)

    def test_without_finite_scores_nothing_is_said_of_a_better_start(self):
        lost = curve("A", "immunized", 0, [0.1, 0.2, 0.3]).model_copy(
            update={"scores": [None] * 3, "folds": [None] * 3}
        )
        lines = [
            Row("x", "scratch", "A", ("A",), ("A",), (0, 1, 2), 5, curves=(curve("A", "scratch", 0, [0.1, 0.2, 0.3]),)),
            Row("x", "D", "A", ("A",), ("A",), (0, 1, 2), 5, curves=(lost,)),
        ]
        findings = tabulate([scene(made={("D", 0): made()})], lines, (0, 1, 2)).findings
        assert any("is at no finite score" in f for f in findings)
        assert not any("By mean over seeds" in f for f in findings)


ERRORS = {
    ("scratch", "scratch"): [[0.20, 0.08, 0.040], [0.20, 0.08, 0.050]],
    ("original", "original"): [[0.20, 0.04, 0.030], [0.20, 0.04, 0.030]],
    ("D", "immunized"): [[0.60, 0.10, 0.050], [0.60, 0.10, 0.070]],
    ("E", "immunized"): [[0.20, 0.09, 0.030], [0.20, 0.09, 0.040]],
}
BENIGN = {("D", 0): 0.0420, ("D", 1): 0.0426, ("E", 0): 0.0400, ("E", 1): 0.0400}
CHANCE, BENIGN_CHANCE = 0.2, 0.5


class TestErrors:
    """Curves hold 1 - error / chance; what is shown is the error, of which smaller is better."""

    def outcome(self, **changes):
        lines = [
            Row(
                "x", model, "A", ("A",), ("A",), (0, 1, 2), 5,
                curves=tuple(curve("s", role, i, [1 - e / CHANCE for e in v]) for i, v in enumerate(seeds)),
            )
            for (model, role), seeds in ERRORS.items()
        ]  # fmt: skip
        own = {place: made(benign=1 - error / BENIGN_CHANCE) for place, error in BENIGN.items()}
        settings = {
            "measure": Measure("mean squared error", CHANCE), "chance": 0.0, "made": own,
            "benign_measure": Measure("mean squared error", BENIGN_CHANCE),
            "original": 1 - 0.0412 / BENIGN_CHANCE,
        }  # fmt: skip
        return tabulate([scene(**settings | changes)], lines, (0, 1, 2), "D")

    def test_errors_are_shown_in_their_own_unit(self):
        found = self.outcome()
        assert list(found.tables) == ["error", "best", "advantage", "trade_off", "difference", "immunization"]
        table = found.tables["error"]
        assert table.title == "Mean squared error over epochs"
        assert "The smaller, the better the model." in table.note
        assert not any(each.percent for each in found.tables.values())
        row = rows(found, "error", "model")["D"]
        assert [row[f"epoch {e}"].mean for e in (0, 1, 2)] == pytest.approx([0.6, 0.1, 0.06])
        assert row["epoch 2"].sd == pytest.approx(0.01 * 2**0.5)
        assert row["benign"].mean == pytest.approx(0.0423)
        assert rows(found, "error", "model")["original"]["benign"].mean == pytest.approx(0.0412)

    def test_the_best_attack_is_the_one_of_the_smallest_error(self):
        best = rows(self.outcome(), "best", "model")
        assert [best["D"][f"epoch {e}"].mean for e in (0, 1, 2)] == pytest.approx([0.6, 0.1, 0.06])
        assert best["D"]["benign rise"].mean == pytest.approx(0.0011)
        assert best["E"]["benign rise"].mean == pytest.approx(-0.0012)
        assert "benign drop" not in best["D"]

    def test_an_advantage_above_0_is_the_adversarys(self):
        advantage = rows(self.outcome(), "advantage", "model")
        assert advantage["original"]["epoch 1"].mean == pytest.approx(0.04)
        assert advantage["D"]["epoch 2"].mean == pytest.approx(-0.015)
        assert advantage["D"]["epoch 2"].standard_error == pytest.approx(0.005)
        assert advantage["D"]["area"].mean == pytest.approx((-0.02 - 0.015) / 2)

    def test_below_0_a_model_resists_more_than_the_one_it_is_compared_with(self):
        row = rows(self.outcome(), "difference", "model")["E"]
        assert row["epoch 1"].mean == pytest.approx(0.01)  # E's error is the smaller one: it resists less than D
        assert row["benign"].mean == pytest.approx(0.0423 - 0.04)
        assert "the error of D minus its own" in self.outcome().tables["difference"].note

    def test_the_papers_numbers_are_errors_as_they_are(self):
        paper = {"D": PaperSpec(benign=0.0423, attacks={"A": {1: (0.614, 0.0046), 2: 0.5}})}
        row = rows(self.outcome(paper=paper), "error", "model")["D"]
        assert (row["epoch 1"].paper, row["epoch 1"].paper_sd) == (0.614, 0.0046)
        assert (row["epoch 2"].paper, row["epoch 2"].paper_sd) == (0.5, None)
        assert row["benign"].paper == 0.0423

    def test_figures_are_of_errors(self):
        figure = self.outcome().figures["attack_0"]
        assert figure.y_title == "mean squared error on r"
        assert figure.series["scratch"] == pytest.approx([0.2, 0.08, 0.045])

    def test_sentences(self):
        original, defended, crossing, _, other, caught_up, _ = self.outcome().findings
        assert original == (
            "After epoch 2, the best attack on the original is at 0.03, from scratch at 0.045; a constant "
            "guess is at 0.2."
        )
        assert defended == (
            "After epoch 2, D under its best attack, A, is at 0.06: an advantage of -0.015 ± 0.005 over scratch, and "
            "an advantage of -0.0175 ± 0.0025 on average over epochs; 1 of 1 attacks end with no smaller error than "
            "the same from scratch. Benign mean squared error was 0.0412 before, and is 0.0423 (+2.7%)."
        )
        assert crossing == "By mean over seeds, fine-tuning D is at no epoch above 0 as good as training from scratch."
        assert "0 of 1 attacks end with no smaller error" in other
        assert other.endswith("and is 0.04 (-2.9%).")
        assert caught_up == (
            "By mean over seeds, fine-tuning E is at least as good as training from scratch from epoch 2 on (0.035 "
            "against 0.045 there)."
        )

    def test_worse_than_the_reference_is_no_riddle(self):
        found = self.outcome(chance=0.95)  # of scores: far above all of them
        assert not any("Below chance" in finding for finding in found.findings)

    def test_an_original_without_a_score_is_left_out(self):
        found = self.outcome(original=None)
        assert not any("Benign" in finding for finding in found.findings)
        assert rows(found, "best", "model")["D"]["benign rise"].mean is None
