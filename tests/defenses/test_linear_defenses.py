"""What each linear defense must do to condition numbers, and what theta does inside a network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from conftest import toy_task
from holdfast.defenses import (
    IMMA,
    ConditionNumber,
    FrontierDefense,
    LinearProblem,
    OptKappa,
    RIllOnly,
    SignalFrontier,
)
from holdfast.defenses.linear.condition_number import eigenpairs
from holdfast.defenses.linear.opt_kappa import kappa_gradient
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, features, load_model
from holdfast.spectral.convergence import measured_tau, predicted_tau
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import RegressionTask, TaskSpec, load_task

CPU = torch.device("cpu")


def make_problem(seed=0, width=12, samples=80, classes=3, spread=2.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(shift):
        turned, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0, -spread / 2, width, dtype=torch.float64).roll(shift) @ turned
        y = nn.functional.one_hot(torch.arange(samples) % classes, classes).double()
        return x + y @ torch.randn(classes, width, generator=generator, dtype=torch.float64) * 0.1, y

    return LinearProblem.of(draw(0), draw(3))


@pytest.fixture
def problem():
    return make_problem()


class TestFrontierDefense:
    def test_reaches_the_bound_at_no_benign_cost(self, problem, run):
        theta, record = FrontierDefense().extractor(problem, run=run)
        ratios = problem.ratios(theta)
        assert ratios.restricted >= 0.999 * problem.frontier.bound
        assert ratios.benign <= 1.001
        assert record.history["rir"] == [ratios.rir]

    def test_whitening_has_the_same_rir_and_is_no_immunization(self, problem, run):
        ratios = problem.ratios(FrontierDefense(stretch=0).extractor(problem, run=run)[0])
        assert ratios.rir == pytest.approx(problem.frontier.bound, rel=1e-6)
        assert ratios.benign == pytest.approx(1 / problem.frontier.benign.condition, rel=1e-6)

    @pytest.mark.parametrize("stretch", [-0.1, math.nan, math.inf])
    def test_refuses(self, stretch):
        with pytest.raises(HoldfastError, match="stretch is"):
            FrontierDefense(stretch=stretch)


class TestSignalFrontier:
    @pytest.mark.parametrize("epsilon", [None, 0.1, 1e-3])
    def test_the_benign_task_takes_one_step_and_the_restricted_one_waits(self, problem, run, epsilon):
        theta, _ = SignalFrontier(epsilon=epsilon).extractor(problem, run=run)
        benign, restricted = problem.frontier.benign, problem.frontier.restricted
        assert predicted_tau(benign.through(theta), 0.999) == 1
        assert predicted_tau(restricted.through(theta)) > 2 * predicted_tau(restricted)

    def test_epsilon_trades_the_benign_condition_number(self, problem, run):
        kappa = problem.frontier.benign.condition
        for epsilon in (0.5, 0.01):
            ratios = problem.ratios(SignalFrontier(epsilon=epsilon).extractor(problem, run=run)[0])
            assert ratios.benign == pytest.approx(1 / (epsilon**2 * kappa), rel=1e-6)

    @pytest.mark.parametrize("epsilon", [0.0, 1.5, -1, math.nan])
    def test_refuses(self, epsilon):
        with pytest.raises(HoldfastError, match="epsilon is"):
            SignalFrontier(epsilon=epsilon)


class TestAlgorithm1:
    @pytest.mark.parametrize("seed", range(3))
    def test_immunizes_and_never_exceeds_the_bound(self, seed, run):
        problem = make_problem(seed)
        theta, record = ConditionNumber(iterations=400).extractor(problem, run=run)
        ratios = problem.ratios(theta)
        assert ratios.restricted > 1.2
        assert ratios.benign <= 1
        assert max(record.history["rir"]) <= problem.frontier.bound * (1 + 1e-6)

    def test_keeps_what_it_is_told_to(self, problem, run):
        def ratios(keep):
            defense = ConditionNumber(iterations=60, learning_rate=1e-2, keep=keep)
            theta, record = defense.extractor(problem, run=run)
            return problem.ratios(theta), record.history

        by_rir, history = ratios("rir")
        assert by_rir.rir == pytest.approx(max(history["rir"]), rel=1e-9)
        last, history = ratios("last")
        assert last.rir == pytest.approx(history["rir"][-1], rel=1e-9)
        kept, history = ratios("definition")
        good = [r for r, b in zip(history["ratio_restricted"], history["ratio_benign"], strict=True) if b <= 1]
        assert kept.restricted == pytest.approx(max(good), rel=1e-9)

    def test_tries_more_multiples_where_the_first_gives_no_immunization(self, problem, run):
        settings = {"iterations": 60, "learning_rate": 1e-2, "ill_multiple": 30}
        alone = ConditionNumber(well_multiple=1e-6, more_multiples=(), **settings)
        theta, record = alone.extractor(problem, run=run)
        assert not problem.ratios(theta).immunized
        assert "does not meet Definition 3.1" in record.events[-1].message
        searching = ConditionNumber(well_multiple=1e-6, more_multiples=(1e-5, 1e4), **settings)
        theta, record = searching.extractor(problem, run=run)
        assert problem.ratios(theta).immunized
        assert [e.message for e in record.events if "tried" in e.message] == [
            "no immunization with well_multiple 1e-06; tried 1e-05",
            "no immunization with well_multiple 1e-05; tried 10000",
        ]

    def test_guaranteed_steps_make_each_condition_number_monotone(self, problem, run):
        defense = ConditionNumber(step="guaranteed", guarantee=0.3)
        descent = defense.start(problem, torch.eye(problem.width, dtype=torch.float64), torch.Generator())
        kappas = []

        def move(step, gradient):
            before = descent.theta
            original(step, gradient)
            task = (problem.frontier.benign, problem.frontier.restricted)[len(kappas) % 2]
            kappas.append((task.through(before).condition, task.through(descent.theta).condition, step))

        original, descent._move = descent._move, move
        for _ in range(6):
            descent.step()
        moved = [(i % 2, before, after) for i, (before, after, step) in enumerate(kappas) if 0 < step < math.inf]
        assert len(moved) > 4
        assert all(after > before if ill else after < before for ill, before, after in moved)

    def test_balanced_weights_give_each_term_the_norm_of_the_loss(self, problem):
        defense = ConditionNumber(well_multiple=2, ill_multiple=3)
        descent = defense.start(
            problem, torch.eye(problem.width, dtype=torch.float64), torch.Generator().manual_seed(0)
        )
        loss, _, well, ill = descent._terms()
        assert (descent.well * well).norm() == pytest.approx(2 * loss.norm().item())
        assert (descent.ill * ill).norm() == pytest.approx(3 * loss.norm().item())

    def test_given_weights_are_used_as_they_are(self, problem):
        defense = ConditionNumber(lambda_well=5, lambda_ill=7, well_multiple=1)
        descent = defense.start(problem, torch.eye(problem.width, dtype=torch.float64), torch.Generator())
        assert (descent.well, descent.ill) == (5, 7)

    def test_full_batch_terms_are_the_preconditioned_gradients(self, problem):
        """K^-1 grad_theta R = 2 theta grad R(H), against a dense solve of Theorem 4.2's gradient."""
        theta = torch.randn(problem.width, problem.width, dtype=torch.float64)
        descent = ConditionNumber().start(problem, theta, torch.Generator())
        _, _, well, ill = descent._terms()
        from holdfast.spectral.regularizers import r_ill, r_well

        for task, r, found in ((problem.frontier.benign, r_well, well), (problem.frontier.restricted, r_ill, ill)):
            at = theta.clone().requires_grad_()
            r(at.T @ task.gram @ at).backward()
            assert torch.allclose(
                torch.linalg.solve(task.gram, at.grad), found, rtol=1e-6, atol=1e-9 * found.abs().max()
            )

    def test_batches_use_the_ridge_of_the_released_code(self, problem, run):
        one, other = (
            ConditionNumber(iterations=5, keep="last", batch_size=8, batch_ridge=r).extractor(problem, run=run)[0]
            for r in (1.0, 10.0)
        )
        assert not torch.allclose(one, other)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"step": "big"}, "Unknown step"),
            ({"optimizer": "sgd"}, "Unknown optimizer"),
            ({"keep": "best"}, "Unknown keep"),
            ({"initialisation": "zero"}, "Unknown initialisation"),
            ({"iterations": 0}, "iterations is 0"),
            ({"learning_rate": 0}, "learning_rate is 0"),
            ({"lambda_ill": -1}, "lambda_ill is -1"),
            ({"guarantee": 1}, "guarantee is 1"),
            ({"more_multiples": (0.0,)}, "more_multiples is"),
            ({"batch_size": 1}, "batch_size is 1"),
            ({"batch_ridge": 0}, "batch_ridge is 0"),
            ({"step": "guaranteed", "batch_size": 8}, "leave batch_size out"),
            ({"space": "all"}, "Unknown space"),
            ({"ridge": 0}, "ridge is 0"),
        ],
    )
    def test_refuses(self, settings, message):
        with pytest.raises(HoldfastError, match=message):
            ConditionNumber(**settings)

    def test_an_extractor_that_is_not_finite_stops_with_an_event(self, problem, run):
        wild = ConditionNumber(optimizer="gd", learning_rate=1e200, iterations=50)
        theta, record = wild.extractor(problem, run=run)
        assert theta.isfinite().all()
        assert "not finite" in record.events[0].message


class TestBaselines:
    def test_r_ill_alone_raises_both(self, problem, run):
        theta, _ = RIllOnly(iterations=100, keep="last", learning_rate=1e-2).extractor(problem, run=run)
        ratios = problem.ratios(theta)
        assert ratios.restricted > 1.5
        assert ratios.benign > 1

    def test_imma_makes_the_simulated_probe_end_worse(self, problem, run):
        theta, _ = IMMA(iterations=60, keep="last", inner_steps=4, learning_rate=1e-2).extractor(problem, run=run)

        def loss_after(task, steps=4):
            from holdfast.spectral.convergence import descend

            path = descend(task)
            w = [next(path) for _ in range(steps + 1)][-1]
            return (task.root @ w - task.target).square().sum().item()

        task = problem.frontier.restricted
        assert loss_after(task.through(theta)) > 1.05 * loss_after(task)

    def test_imma_needs_restricted_targets(self, run):
        x = torch.randn(20, 3, dtype=torch.float64)
        with pytest.raises(HoldfastError, match="no targets"):
            IMMA().extractor(LinearProblem.of((x, x), (x, x[:, :0])), run=run)

    @pytest.mark.parametrize("log", [True, False])
    def test_kappas_gradient_is_autograds(self, problem, log):
        theta = torch.randn(problem.width, problem.width, dtype=torch.float64, requires_grad=True)
        sigma = torch.linalg.svdvals(problem.frontier.benign.root @ theta)
        kappa = (sigma[0] / sigma[-1]) ** 2
        (kappa.log() if log else kappa).backward()
        found = kappa_gradient(problem.frontier.benign, theta.detach(), log=log)
        assert torch.allclose(found, theta.grad, rtol=1e-7, atol=1e-9 * float(theta.grad.abs().max()))

    def test_opt_kappa_lowers_its_objective(self, problem, run):
        theta, _ = OptKappa(iterations=60, log=True, keep="last", learning_rate=1e-2).extractor(problem, run=run)
        assert problem.ratios(theta).rir > 1.5


class TestInANetwork:
    @pytest.mark.parametrize("defense", [FrontierDefense(), SignalFrontier()], ids=lambda d: d.name)
    def test_benign_outputs_stay(self, defense, trained, benign, restricted, run):
        immunized, record = defense.immunize(trained, benign, restricted, run=run)
        x = next(benign.sweep("test", 200, device=CPU)).x
        with torch.no_grad():
            before, after = trained.eval()(x), immunized(x)
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        assert record.history["output_change"][0] <= 1e-5
        assert benign.score(immunized) == benign.score(trained)

    def test_the_features_are_those_of_the_extractor(self, trained, benign, restricted, run):
        """The report's (ii) is what somebody measures on the released model's features, up to float32 and scale."""
        immunized, record = SignalFrontier(epsilon=0.05).immunize(trained, benign, restricted, run=run)
        problem = LeastSquares.of(*features(immunized, benign, "train"))
        signal = problem.spectrum.values
        assert record.history["ratio_benign"][0] > 0
        assert signal[0] / signal[4] == pytest.approx(1, rel=1e-3)  # five benign classes: five directions of one scale
        assert signal[4] / signal[5] == pytest.approx(1 / 0.05, rel=1e-2)

    def test_a_second_extractor_is_merged_into_the_first(self, trained, benign, restricted, run):
        once, _ = FrontierDefense(stretch=0).immunize(trained, benign, restricted, run=run)
        twice, _ = FrontierDefense().immunize(once, benign, restricted, run=run)
        assert set(twice.network.state_dict()) == set(once.network.state_dict())
        x = next(benign.sweep("test", 50, device=CPU)).x
        with torch.no_grad():
            assert torch.allclose(twice(x), trained.eval()(x), atol=1e-3)

    def test_survives_the_disk(self, trained, benign, restricted, run, tmp_path):
        immunized, _ = SignalFrontier().immunize(trained, benign, restricted, run=run)
        immunized.save(tmp_path / "model.safetensors")
        loaded = load_model(str(tmp_path / "model.safetensors"), benign)
        assert loaded.has_extractor
        assert loaded.facts().sha256 == immunized.facts().sha256

    def test_scratch_has_no_extractor(self, trained, benign, restricted, run):
        immunized, _ = SignalFrontier().immunize(trained, benign, restricted, run=run)
        assert not immunized.fresh().has_extractor

    def test_an_extractor_that_cannot_be_resolved_is_said(self, trained, benign, restricted, run):
        _, record = SignalFrontier(epsilon=1e-12).immunize(trained, benign, restricted, run=run)
        assert "benign outputs change" in record.events[0].message

    def test_a_convolution_as_the_head(self, run):
        network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 5, 1))
        model = SplitModel(network, "3")
        benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
        immunized, _ = FrontierDefense().immunize(model, benign, restricted, run=run)
        x = next(benign.sweep("test", 50, device=CPU)).x
        with torch.no_grad():
            assert torch.allclose(immunized(x), model.eval()(x), atol=1e-4)

    @pytest.mark.parametrize(
        ("theta", "message"),
        [
            (torch.eye(3, dtype=torch.float64), "takes 64 features"),
            (torch.zeros(64, 64, dtype=torch.float64), "cannot be inverted"),
            (torch.full((64, 64), math.nan, dtype=torch.float64), "cannot be inverted"),
        ],
    )
    def test_refuses_what_the_head_could_not_undo(self, model, theta, message):
        with pytest.raises(HoldfastError, match=message):
            model.insert_extractor(theta)


class TestBadInput:
    def test_disjoint_supports(self, run):
        x = torch.eye(6, dtype=torch.float64)
        with pytest.raises(HoldfastError, match="No direction is used by both"):
            LinearProblem.of((x[:3], x[:3, :1]), (x[3:], x[3:, :1]))

    def test_with_a_ridge_disjoint_supports_have_a_defined_result(self, run):
        x = torch.eye(6, dtype=torch.float64)
        problem = LinearProblem.of((x[:3], x[:3, :1]), (x[3:], x[3:, :1]), space="ridge", ridge=0.1)
        theta, _ = FrontierDefense().extractor(problem, run=run)
        assert problem.ratios(theta).rir == pytest.approx(problem.frontier.bound, rel=1e-6)

    def test_other_widths(self):
        x = torch.randn(9, 4, dtype=torch.float64)
        with pytest.raises(HoldfastError, match="4 and 3 features"):
            LinearProblem.of((x, x), (x[:, :3], x))

    def test_constant_duplicate_columns_and_few_rows(self, run):
        problem = make_problem(samples=7)  # fewer rows than columns
        x, y = problem.benign
        wide = torch.cat([x, x[:, :1], torch.zeros(len(x), 1, dtype=torch.float64)], 1)
        other = torch.cat([problem.restricted[0], torch.zeros(7, 2, dtype=torch.float64)], 1)
        again = LinearProblem.of((wide, y), (other, problem.restricted[1]))
        theta, _ = FrontierDefense().extractor(again, run=run)
        assert again.ratios(theta).rir == pytest.approx(again.frontier.bound, rel=1e-5)

    def test_nan(self):
        x = torch.randn(9, 4)
        x[2, 1] = math.nan
        with pytest.raises(HoldfastError, match="not finite at row 2, column 1"):
            LinearProblem.of((x, x), (x, x))

    def test_tasks_that_the_model_cannot_take(self, trained, benign, run):
        with pytest.raises(HoldfastError, match="cannot take the inputs"):
            FrontierDefense().immunize(trained, benign, toy_task(3), run=run)


class TestRealData:
    def house_prices(self, data_dir, rows=None):
        def task(name, target, other):
            spec = TaskSpec(
                data=name,
                kind="regression",
                target=target,
                drop=[other],
                encoding="ordinal",
                **({"test_fraction": 0} if rows is None else {"rows": rows}),
            )
            return load_task(spec, data_dir=data_dir)

        return task("house_prices_D1", "LotArea", "SalePrice"), task("house_prices_D2", "SalePrice", "LotArea")

    def test_house_prices_are_the_measured_ones(self, data_dir):
        benign, restricted = (LeastSquares.of(*features(None, t, "train")) for t in self.house_prices(data_dir))
        assert (benign.spectrum.rank, restricted.spectrum.rank) == (74, 76)
        assert (round(benign.condition), round(restricted.condition)) == (254, 209)

    @pytest.mark.parametrize("rows", [None, 200])
    def test_house_prices_frontier(self, data_dir, run, rows):
        pair = [features(None, t, "train") for t in self.house_prices(data_dir, rows)]
        problem = LinearProblem.of(*pair)
        ratios = problem.ratios(FrontierDefense().extractor(problem, run=run)[0])
        assert ratios.restricted >= 0.999 * problem.frontier.bound
        assert ratios.benign <= 1.001
        own = problem.ratios(ConditionNumber(iterations=60, keep="rir").extractor(problem, run=run)[0])
        assert 1 < own.rir <= problem.frontier.bound

    def test_the_signal_frontier_on_real_features(self, data_dir, run):
        spec = {"name": "cifar_resnet", "options": {"depth": 20}, "weights": "weights/cifar10_resnet20.safetensors"}
        from holdfast.adversaries import Probe
        from holdfast.models import ModelSpec

        benign = load_task("cifar10@test_limit=300", data_dir=data_dir).few_shot(60, 0)
        restricted = load_task("cifar100_objects@test_limit=300", data_dir=data_dir).few_shot(60, 0)
        network = load_model(ModelSpec(**spec), benign, data_dir=data_dir).eval()

        def seen(task, split):
            with torch.no_grad():
                return torch.cat([network.features(batch.x) for batch in task.sweep(split, 200, device=CPU)])

        # All that follows is about the head's inputs: they are computed once, and the head is the whole model.
        benign, restricted = (t.with_inputs(*(seen(t, s) for s in ("train", "test"))) for t in (benign, restricted))
        model = SplitModel(nn.Sequential(network.head), "0")
        immunized, record = SignalFrontier().immunize(model, benign, restricted, run=run)
        assert record.history["ratio_benign"][0] <= 1.001
        probe = Probe("line-search", "raw")
        before, after = (probe.attack(m, restricted, budgets=(0, 100), run=run).scores[1] for m in (model, immunized))
        assert before > 0.6
        assert after < 0.5
        early, late = probe.attack(immunized, benign, budgets=(0, 10, 300), run=run).scores[1:]
        assert early >= late - 0.002
        tau = LeastSquares.of(*features(immunized, restricted, "train"))
        measured = measured_tau(tau, 0.5, max_steps=5000)
        assert measured is not None
        assert predicted_tau(tau, 0.5) == pytest.approx(measured, rel=0.1)


def test_regression_tasks_are_immunized_and_probed(run):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 5, dtype=torch.float64)
    first, second = (x @ torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    tasks = [
        RegressionTask(n, x[:40], y[:40] / y.std(), x[40:], y[40:] / y.std()) for n, y in (("a", first), ("b", second))
    ]
    model = SplitModel(nn.Sequential(nn.Linear(5, 1, dtype=torch.float64)), "0")
    immunized, _ = SignalFrontier().immunize(model, *tasks, run=run)
    from holdfast.adversaries import Probe

    solved = Probe("ridge", "raw").attack(immunized, tasks[1], budgets=(0, 1), run=run)
    assert solved.scores[0] < 0.5  # explained variance: a constant guess has 0
    assert solved.scores[1] > 0.99


def test_eigenpairs_are_those_of_the_hessian(problem):
    theta = torch.randn(problem.width, 7, dtype=torch.float64)
    sigma, v = eigenpairs(problem.frontier.benign, theta)
    hessian = theta.T @ problem.frontier.benign.gram @ theta
    assert torch.allclose(hessian, (v * sigma) @ v.T, atol=1e-9 * float(hessian.abs().max()))
