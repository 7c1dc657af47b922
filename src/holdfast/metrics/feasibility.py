"""Whether a linear extractor can immunize a pair of tasks, how much, and at what benign cost; nothing is trained."""

from __future__ import annotations

import math

import torch

from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, check_feature_width, check_fits, feature_batches, feature_precision
from holdfast.results import Feasibility
from holdfast.results.tables import Figure, Lines, Map
from holdfast.spectral.convergence import predicted_tau
from holdfast.spectral.frontier import Frontier, angles
from holdfast.spectral.least_squares import LeastSquares
from holdfast.tasks import Task

POSSIBLE, MARGINAL = 10.0, 2.0
NOISE_FACTOR = 3.0
SHOWN = 24
GRID = 60


def assess(
    model: SplitModel | None, benign: Task, restricted: Task, *, ridge: float = 0.01, q: float = 0.9
) -> tuple[Feasibility, dict[str, Figure]]:
    """Decides from spectra alone whether linear immunization can work.

    Memory is O(D^2) for any number of samples, besides cached features (see `FeatureCache`).

    Args:
        model: the model that computes the features; None: the features are the flattened inputs.
        benign: the task that should stay easy to learn.
        restricted: the task that should become hard to learn.
        ridge: per sample, for the bound on all features; see `Frontier.of`.
        q: share of the removable loss in tau_q.

    Returns:
        The assessment, and its figures.

    Raises:
        HoldfastError: if model and tasks do not fit, or the tasks share no features.

    Example:
        >>> from holdfast.tasks import load_task
        >>> found, _ = assess(None, load_task("digits[0-4]"), load_task("digits[5-9]"))
        >>> found.label, found.features, found.common < 64
        ('marginal', 64, True)
    """
    check(model, benign, restricted, ridge=ridge, q=q)
    problems = [
        LeastSquares.stream(feature_batches(model, task, "train"), precision=feature_precision(model, task))
        for task in (benign, restricted)
    ]
    ridged = Frontier.of(*problems, space="ridge", ridge=ridge)
    try:
        frontier = Frontier.of(*problems)
        common = len(frontier.mu)
    except HoldfastError:  # no common direction: numbers are then with a ridge, and the reasons say so
        frontier, common = ridged, 0
    noise = _noise(model, benign)
    leak = frontier.leak()
    tau, bound = _steps(frontier, q), frontier.bound
    label = _label(bound, noise, few=common < problems[0].features / 2)
    result = Feasibility(
        label=label,
        sentence=_sentence(label, bound, noise, common, problems[0].features),
        reasons=[_noise_reason(noise), *_reasons(frontier, ridged, problems, common, ridge, leak, tau, q)],
        benign_task=benign.name,
        restricted_task=restricted.name,
        features=problems[0].features,
        rank_benign=problems[0].spectrum.rank,
        rank_restricted=problems[1].spectrum.rank,
        common=common,
        kappa_benign=frontier.benign.condition,
        kappa_restricted=frontier.restricted.condition,
        kappa_m=frontier.kappa_m,
        rir_bound=bound,
        rir_bound_ridge=ridged.bound,
        rir_bound_noise=_finite(noise),
        ridge=ridge,
        leak=_finite(leak),
        tau_q=q,
        tau=tau,
    )
    return result, _figures(frontier)


def _steps(frontier: Frontier, q: float) -> dict[str, dict[str, float | None]]:
    """Returns the predicted steps of a probe on each task, by extractor."""
    extractors = {
        "identity": torch.eye(len(frontier.mu)).to(frontier.basis),
        "whitening": frontier.stretch(0.0),
        "stretch": frontier.stretch(),
        "signal frontier": frontier.protect_signal(),
    }
    return {
        name: {
            "benign": _finite(predicted_tau(frontier.benign.through(theta), q)),
            "restricted": _finite(predicted_tau(frontier.restricted.through(theta), q)),
        }
        for name, theta in extractors.items()
    }


def check(model: SplitModel | None, benign: Task, restricted: Task, *, ridge: float, q: float) -> None:
    """Checks the arguments of `assess` before any work, and raises the same errors."""
    if not 0 < ridge < math.inf:
        raise HoldfastError(f"ridge is {ridge}; expected a number above 0.")
    if not 0 < q < 1:
        raise HoldfastError(f"q is {q}; expected a share between 0 and 1.")
    if model is not None:
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
    elif any(task.vocabulary is not None for task in (benign, restricted)):
        raise HoldfastError(
            "The inputs themselves are token ids, which are not features; name a model that reads them."
        )
    elif benign.input_shape != restricted.input_shape:
        raise HoldfastError(
            f"Inputs of {benign.name!r} have shape {benign.input_shape}, those of {restricted.name!r} "
            f"{restricted.input_shape}; they must agree. For images, set image_size and channels."
        )
    check_feature_width(model, benign)


def _noise(model: SplitModel | None, task: Task) -> float:
    """Returns RIR* between two halves of the benign samples, which would be 1 with enough samples."""
    halves = [
        LeastSquares.stream(
            ((x[i::2], y[i::2]) for x, y in feature_batches(model, task, "train") if len(x) > 1),
            precision=feature_precision(model, task),
        )
        for i in (0, 1)
    ]
    try:
        return Frontier.of(*halves).bound
    except HoldfastError:
        return math.inf


def _label(bound: float, noise: float, *, few: bool) -> str:
    """Returns the label; `few`: whether the tasks share only few directions."""
    if bound >= POSSIBLE and bound >= NOISE_FACTOR * noise:
        return "possible"
    return "marginal" if bound >= MARGINAL or few else "impossible"


def _noise_reason(noise: float) -> str:
    if not math.isfinite(noise):
        return (
            "There are too few benign samples to measure the effect of sampling on RIR*: two halves share no direction."
        )
    return (
        f"Because of sampling, RIR* is {_text(noise)} between two halves of the benign samples, where it should be 1: "
        "only values well above that are a property of the tasks."
    )


def _text(value: float) -> str:
    """Formats 1940 as 1,940 instead of 1.94e+03."""
    return f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"


def _sentence(label: str, bound: float, noise: float, common: int, features: int) -> str:
    if label == "possible":
        return (
            f"Linear immunization is possible: the restricted probe can be made {_text(bound)} times worse "
            "conditioned while the benign one keeps its condition number and every benign prediction."
        )
    if label == "marginal" and (bound < MARGINAL or not math.isfinite(noise)):
        return (
            f"Not clear: the tasks' samples share {common} of {features} directions, too few to tell what an extractor "
            "could do. Take more samples, or fewer features."
        )
    if label == "marginal" and bound >= POSSIBLE:
        return (
            f"Not clear: RIR* is {_text(bound)}, but two halves of the benign task alone have {_text(noise)}. Most "
            "of it may be sampling; take more samples, or fewer features."
        )
    if label == "marginal":
        return (
            f"Linear immunization can achieve little: at most {_text(bound)} times the restricted condition number at "
            "no benign cost."
        )
    return (
        "Linear immunization is not possible: no linear extractor makes the restricted probe more than "
        f"{_text(bound)} times worse conditioned relative to the benign one; the two tasks' features are stretched "
        "alike."
    )


def _reasons(
    frontier: Frontier,
    ridged: Frontier,
    problems: list[LeastSquares],
    common: int,
    ridge: float,
    leak: float,
    tau: dict[str, dict[str, float | None]],
    q: float,
) -> list[str]:
    reasons = []
    width = problems[0].features
    if not common:
        reasons.append(
            f"The two tasks share none of {width} directions, so there is no bound without a ridge: all numbers are "
            f"with a ridge of {ridge:g} on all of them."
        )
    elif common < width:
        ranks = f"the benign features span {problems[0].spectrum.rank}"
        ranks += f" and the restricted ones {problems[1].spectrum.rank}"
        reasons.append(
            f"Of {width} directions {ranks}; both use {common}, and the numbers are on those. A direction that only "
            f"one task uses has no bound: with a ridge of {ridge:g} on all of them RIR* is {_text(ridged.bound)}."
        )
    reasons.append(
        f"The whole frontier is kappa_H = {_text(frontier.kappa_m)} kappa_P: every further factor of restricted "
        "condition number costs the same factor of the benign one."
    )

    def steps(extractor: str, task: str) -> str:
        value = tau[extractor][task]
        return "never" if value is None else f"{value:,.0f}"

    reasons.append(
        f"But a condition number is about the worst direction, not about those that carry labels. Gradient descent "
        f"removes {q:.0%} of the removable restricted loss in {steps('identity', 'restricted')} steps as it is, "
        f"{steps('stretch', 'restricted')} behind the stretch and {steps('signal frontier', 'restricted')} behind the "
        f"signal frontier; of the benign loss in {steps('identity', 'benign')}, {steps('stretch', 'benign')} and "
        f"{steps('signal frontier', 'benign')}."
    )
    if math.isfinite(leak):
        reasons.append(
            f"{leak:.1%} of what a probe can learn of the restricted labels is in the benign signal itself: no signal "
            "frontier slows that part down."
        )
    reasons.append(
        "All of this is about gradient descent on a linear probe. Whitening the features or solving the least squares "
        "at once undoes it, and fine-tuning the network is not covered: audit with probes-v1 and quick-v1."
    )
    return reasons


def _figures(frontier: Frontier) -> dict[str, Figure]:
    spectra = {
        name: task.spectrum.values.square() / task.samples
        for name, task in (("benign", frontier.benign), ("restricted", frontier.restricted))
    }
    cosines = angles(frontier.benign, frontier.restricted)[:SHOWN, :SHOWN]
    labels = [str(i + 1) for i in range(len(cosines))]
    kappa, top = frontier.benign.condition, max(10 * frontier.benign.condition, 10.0)
    grid = sorted({*(top ** (i / GRID) for i in range(GRID + 1)), kappa})
    return {
        "spectra": Lines(
            title="Spectra of both tasks",
            x_title="direction of the task, by curvature",
            y_title="eigenvalue of the Hessian, per sample",
            log_y=True,
            x=[float(i + 1) for i in range(len(frontier.mu))],
            series={name: values.tolist() for name, values in spectra.items()},
        ),
        "angles": Map(
            title="How far the tasks' directions agree: |cos| of the angle, first directions first",
            row_title="benign direction",
            column_title="restricted direction",
            value_title="|cos|",
            rows=labels,
            columns=labels,
            panels={"": cosines.tolist()},
        ),
        "frontier": Lines(
            title="The frontier: no linear extractor is above the line",
            x_title="benign condition number",
            y_title="restricted condition number",
            log_x=True,
            log_y=True,
            x=grid,
            series={
                "frontier": [frontier.kappa_m * x for x in grid],
                "the features as they are": [frontier.restricted.condition if x == kappa else None for x in grid],
                "whitening": [frontier.kappa_m if x == 1 else None for x in grid],
                "stretch": [frontier.kappa_m * kappa if x == kappa else None for x in grid],
            },
        ),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
