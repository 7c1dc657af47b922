"""Slow twins, transcribed from the papers' equations: what the fast code must agree with."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn


def ice(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON, Eq. 11, sample by sample and class by class."""
    total = torch.zeros((), dtype=logits.dtype)
    for z, y in zip(logits, labels, strict=True):
        p = torch.exp(z) / torch.exp(z).sum()
        for j in range(len(z)):
            total = total - (1.0 if j == y else 0.0) * torch.log(1 - p[j])
    return total / len(logits)


def ice_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON, Eq. 12, of the mean over samples."""
    gradient = torch.empty_like(logits)
    for n, (z, y) in enumerate(zip(logits, labels, strict=True)):
        p = torch.softmax(z, -1)
        for i in range(len(z)):
            gradient[n, i] = p[y] if i == y else -p[i] * p[y] / (1 - p[y])
    return gradient / len(logits)


def released_ice(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of SOPHON's released code: the cross-entropy of 1 - z."""
    odds = (1 - logits).exp()
    return torch.stack([(odds[n].sum() / odds[n, labels[n]]).log() for n in range(len(labels))]).mean()


def klu(logits: Tensor) -> Tensor:
    """SOPHON, Eq. 13."""
    total = torch.zeros((), dtype=logits.dtype)
    for z in logits:
        p = torch.exp(z) / torch.exp(z).sum()
        for j in range(len(z)):
            total = total - torch.log(len(z) * p[j]) / len(z)
    return total / len(logits)


def klu_gradient(logits: Tensor) -> Tensor:
    """SOPHON, Eq. 14, of the mean over samples."""
    return (torch.softmax(logits, -1) - 1 / logits.shape[1]) / len(logits)


def squared_error(outputs: Tensor, noise: Tensor) -> Tensor:
    """L_MSE of SOPHON, section 4.3.2, as a mean over pixels."""
    total = torch.zeros((), dtype=outputs.dtype)
    for guess, epsilon in zip(outputs.flatten(), noise.flatten(), strict=True):
        total = total + (epsilon - guess) ** 2
    return total / outputs.numel()


def squared_error_gradient(outputs: Tensor, noise: Tensor) -> Tensor:
    """SOPHON, Eq. 15, of the mean over pixels."""
    return 2 * (outputs - noise) / outputs.numel()


def dos(outputs: Tensor) -> Tensor:
    """SOPHON, Eq. 16, sample by sample, as a mean over pixels."""
    total = torch.zeros((), dtype=outputs.dtype)
    for guess in outputs:
        total = total + sum(value**2 for value in guess.flatten())
    return total / outputs.numel()


def dos_gradient(outputs: Tensor) -> Tensor:
    """What SOPHON says below Eq. 16, of the mean over pixels."""
    return 2 * outputs / outputs.numel()


def noised(x0: Tensor, t: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Ho et al. 2020, Eq. 4, image by image."""
    return torch.stack(
        [math.sqrt(alpha_bar[s]) * x + math.sqrt(1 - alpha_bar[s]) * e for x, s, e in zip(x0, t, noise, strict=True)]
    )


def adam_simulation(
    model: nn.Module,
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor],
    suppression: Callable[[Tensor, Tensor], Tensor],
    training: list[tuple[Tensor, Tensor]],
    evaluation: list[tuple[Tensor, Tensor]],
    gamma: list[float],
    rate: float,
) -> dict[str, Tensor]:
    """First-order meta-gradient of SOPHON's Eq. 4 for one simulated Adam: every phi_k is kept, gradients come last.

    Adam is written out (Kingma and Ba 2015, Algorithm 1, with the usual 0.9, 0.999, 1e-8).
    """
    phi = copy.deepcopy(model)
    first = {n: torch.zeros_like(p) for n, p in phi.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in phi.named_parameters()}
    path = []
    for t, batch in enumerate(training, 1):
        phi.train()
        names, parameters = zip(*phi.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss(phi, batch), parameters)
        with torch.no_grad():
            for name, parameter, g in zip(names, parameters, grads, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
                parameter.sub_(rate * m / (v.sqrt() + 1e-8))
        path.append(copy.deepcopy(phi))
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for phi_k, (x, y), weight in zip(path, evaluation, gamma, strict=True):
        phi_k.train()
        value = suppression(phi_k(x), y)
        for (name, _), g in zip(
            phi_k.named_parameters(), torch.autograd.grad(value, list(phi_k.parameters())), strict=True
        ):
            total[name] += weight * g
    return total


# Model Immunization from a Condition Number Perspective (ICML 2025). Each by a full singular value decomposition or
# eigen-decomposition and dense solves, in float64.


def matrix(rows: int, columns: int, singular: Tensor, seed: int) -> Tensor:
    """A matrix with these singular values and random singular vectors: what the tests draw their cases from."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(singular), dtype=torch.float64, generator=generator)).Q
        for n in (rows, columns)
    )
    return (u * singular) @ v.T


def compact_svd(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma, V over the non-zero singular values, with the usual tolerance max(M, N) eps sigma_max."""
    u, sigma, vh = torch.linalg.svd(s)
    rank = sum(bool(value > max(s.shape) * torch.finfo(s.dtype).eps * sigma[0]) for value in sigma)
    return u[:, :rank], sigma[:rank], vh[:rank].T


def kappa(s: Tensor) -> float:
    """Eq. 1: ||S||_2 ||S^+||_2."""
    _, sigma, _ = compact_svd(s)
    return float(max(sigma) * max(1 / sigma))


def r_well(s: Tensor) -> Tensor:
    """Eq. 3, p the rank; autograd can go through it where the singular values are simple."""
    rank = len(compact_svd(s.detach())[1])
    return torch.linalg.svdvals(s)[0] ** 2 / 2 - torch.trace(s.T @ s) / (2 * rank)


def r_ill(s: Tensor) -> Tensor:
    """Eq. 12, likewise."""
    rank = len(compact_svd(s.detach())[1])
    return 1 / (torch.trace(s.T @ s) / (2 * rank) - torch.linalg.svdvals(s)[rank - 1] ** 2 / 2)


def r_well_gradient(s: Tensor) -> Tensor:
    """Theorem A.1 (3)."""
    u, sigma, v = compact_svd(s)
    return sigma[0] * torch.outer(u[:, 0], v[:, 0]) - s / len(sigma)


def r_ill_gradient(s: Tensor) -> Tensor:
    """Eq. 13."""
    u, sigma, v = compact_svd(s)
    k = len(sigma)
    denominator = sum(value**2 for value in sigma) / (2 * k) - sigma[-1] ** 2 / 2
    return (sigma[-1] * torch.outer(u[:, -1], v[:, -1]) - s / k) / denominator**2


def gradient_by_theta(theta: Tensor, k: Tensor, *, ill: bool) -> Tensor:
    """Theorem 4.2, with H(theta) = theta' K theta of Eq. 9."""
    h = theta.T @ k @ theta
    return 2 * k @ theta @ (r_ill_gradient(h) if ill else r_well_gradient(h))


def hessian_gradient(h: Tensor, *, ill: bool) -> Tensor:
    """The gradients of R_well and R_ill at a symmetric H, by the eigen-decomposition of the whole of it."""
    sigma, q = torch.linalg.eigh(h)
    keep = sigma > len(h) * torch.finfo(h.dtype).eps * sigma[-1]
    rank, at = int(keep.sum()), int((~keep).sum()) if ill else -1
    rough = sigma[at] * torch.outer(q[:, at], q[:, at]) - h / rank
    if not ill:
        return rough
    return rough / ((h * h).sum() / (2 * rank) - sigma[at] ** 2 / 2) ** 2


def preconditioned(x: Tensor, theta: Tensor, *, ridge: float, ill: bool) -> Tensor:
    """K^-1 grad_theta R(theta' X'X theta), the naive way: everything D x D, K + ridge I solved densely."""
    k = x.T @ x
    gradient = 2 * k @ theta @ hessian_gradient(theta.T @ k @ theta, ill=ill)
    return torch.linalg.solve(k + ridge * torch.eye(len(k), dtype=k.dtype), gradient)


def algorithm_1_line_6(
    theta: Tensor,
    supervised: Tensor,
    benign: Tensor,
    restricted: Tensor,
    *,
    rate: float,
    weights: tuple[float, float],
    ridges: tuple[float, float],
) -> Tensor:
    """Algorithm 1, line 6: theta_{t+1} from the supervised loss's gradient and both tasks' inputs."""
    of_well = preconditioned(benign, theta, ridge=ridges[0], ill=False)
    of_ill = preconditioned(restricted, theta, ridge=ridges[1], ill=True)
    return theta - rate * supervised - rate * weights[0] * of_well - rate * weights[1] * of_ill


def immunization_ratio(theta: Tensor, benign: Tensor, restricted: Tensor) -> tuple[float, float]:
    """Eq. 15 (i) and (ii), from data matrices; kappa of X'X is the square of kappa of X."""
    one = kappa(restricted @ theta) ** 2 / kappa(restricted) ** 2
    two = kappa(benign @ theta) ** 2 / kappa(benign) ** 2
    return one, two


def rir_theta0(original, immunized, benign: list, restricted: list) -> list[tuple[float, float, float]]:
    """Eq. 17 and 18, group by group: Hessians X~'X~ of features, written out, and ratios of their condition numbers.

    Args:
        original: maps inputs (N, ...) to features (N, D), in float64.
        immunized: likewise.
        benign: inputs of each group.
        restricted: likewise.
    """

    def hessian_kappa(extract, x: Tensor) -> float:
        z = extract(x)
        return kappa(z) ** 2  # the eigenvalues of X~'X~ are the squares of X~'s singular values

    found = []
    for p, h in zip(benign, restricted, strict=True):
        first = hessian_kappa(immunized, h) / hessian_kappa(original, h)
        second = hessian_kappa(immunized, p) / hessian_kappa(original, p)
        found.append((first, second, first / second))
    return found


def least_squares_erasure(x: Tensor, z: Tensor, norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition that LEACE solves: least change, under the constraint that no covariance with z is left.

    Minimises E (P x + b - x)' M (P x + b - x) subject to Cov(P x + b, z) = 0 by the linear equations of its Lagrangian,
    without any closed form. b is what keeps the mean.

    Returns:
        P, shape (D, D), for columns x, and b.
    """
    width, mean = x.shape[1], x.mean(0)
    centred, labels = x - mean, z - z.mean(0)
    sigma, cross = centred.T @ centred / len(x), centred.T @ labels / len(x)
    m = torch.eye(width, dtype=x.dtype) if norm is None else norm
    # M (P - I) Sigma + L cross' = 0 and P cross = 0, for the entries of P and of the multipliers L, row by row.
    size, count = width * width, width * cross.shape[1]
    identity = torch.eye(width, dtype=x.dtype)
    system = torch.zeros(size + count, size + count, dtype=x.dtype)
    system[:size, :size] = torch.kron(m, sigma)  # of vec by rows: M P Sigma -> (M kron Sigma') vec P
    system[:size, size:] = torch.kron(identity, cross)
    system[size:, :size] = torch.kron(identity, cross.T.contiguous())
    right = torch.cat([(m @ sigma).flatten(), torch.zeros(count, dtype=x.dtype)])
    p = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:size, 0].view(width, width)
    return p, mean - p @ mean


def proposition_3_2(theta: Tensor, k: Tensor) -> Tensor:
    """Eq. 10 as printed, one number for each singular vector of theta; see the tests for what these numbers are."""
    u, singular, _ = torch.linalg.svd(theta)
    gamma, q = torch.linalg.eigh(k)
    values = torch.zeros(len(k), dtype=k.dtype)
    for i in range(len(k)):
        for j in range(len(k)):
            values[i] += (singular[i] * (u[:, i] @ q[:, j]) * gamma[j].clamp_min(0).sqrt()) ** 2
    return values


def probe_path(x: Tensor, y: Tensor, steps: int, *, line_search: bool) -> list[Tensor]:
    """w_0 = 0, w_1, ... of gradient descent on 1/2 ||X w - Y||^2, on the data themselves.

    The constant step is 1 / lambda_max. The exact line search minimises the loss, one step for all columns.
    """
    w = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)
    constant = 1 / torch.linalg.svdvals(x)[0] ** 2
    path = [w]
    for _ in range(steps):
        g = x.T @ (x @ w - y)
        step = (g * g).sum() / (g * (x.T @ (x @ g))).sum() if line_search else constant
        w = w - step * g
        path.append(w)
    return path


def tau(x: Tensor, y: Tensor, q: float, *, steps: int) -> int | None:
    """The first step of gradient descent at which a share q of the loss that any probe can remove is gone."""
    best = (x @ (torch.linalg.pinv(x) @ y) - y).square().sum()
    for t, w in enumerate(probe_path(x, y, steps, line_search=False)):
        if (x @ w - y).square().sum() - best <= (1 - q) * (y.square().sum() - best):
            return t
    return None


def norm_ratios(x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Eq. 16 for t = 0..steps, under exact line search."""
    best = torch.linalg.pinv(x) @ y
    path = probe_path(x, y, steps, line_search=True)
    return [float((w - best).norm() ** 2 / (path[0] - best).norm() ** 2) for w in path]


# What the curves of an audit say, from the docstring of `holdfast.auditing.statistics`: plain loops over lists.


def best_of_battery(scores: list, *, both_ways: bool = True) -> list:
    """From scores [adversary][seed][budget][fold], NaN where not finite: of each scored half, [seed][budget][fold].

    What scores a half of the folds is chosen on the other half.
    """
    adversaries, seeds = range(len(scores)), range(len(scores[0]))
    budgets, folds = range(len(scores[0][0])), range(len(scores[0][0][0]))
    even, odd = [f for f in folds if f % 2 == 0], [f for f in folds if f % 2] or [0]
    halves = []
    for choosing, scored in [(even, odd), (odd, even)][: 2 if both_ways else 1]:
        rows = []
        for s in seeds:
            row, highest, chosen = [], -math.inf, None
            for k in budgets:
                for a in adversaries:
                    if any(math.isnan(scores[a][t][k][f]) for t in seeds for f in folds):
                        continue
                    mean = statistics.fmean(statistics.fmean(scores[a][t][k][f] for f in choosing) for t in seeds)
                    if mean > highest:
                        highest, chosen = mean, (a, k)
                row.append([math.nan if chosen is None else scores[chosen[0]][s][chosen[1]][f] for f in scored])
            rows.append(row)
        halves.append(rows)
    return halves


def mean_best(halves: list) -> list[float]:
    """The mean over seeds and over the scored halves, at each budget."""
    seeds, budgets = range(len(halves[0])), range(len(halves[0][0]))
    return [
        statistics.fmean(statistics.fmean(statistics.fmean(half[s][k]) for half in halves) for s in seeds)
        for k in budgets
    ]


def advantage_band(one: list, other: list, seed: int, replicates: int) -> list[tuple[float, float]]:
    """The band around the advantage of one battery over the other at every budget, from their scored halves."""
    generator = np.random.default_rng(seed)
    n, widths, budgets = len(one[0]), [len(half[0][0]) for half in one], range(len(one[0][0]))

    def draws(size: int) -> list:
        return [generator.multinomial(size, [1 / size] * size) / size for _ in range(replicates)]

    def g(size: int) -> float:
        return math.sqrt(size / (size - 1)) * float(stats.t.ppf(0.975, size - 1) / stats.norm.ppf(0.975))

    by_seed, by_fold = draws(n), [draws(width) for width in widths]
    centre = [a - b for a, b in zip(mean_best(one), mean_best(other), strict=True)]
    deviations = []
    for r in range(replicates):
        row = []
        for k in budgets:
            d = e = 0.0
            for sign, halves in ((1, one), (-1, other)):
                for s in range(n):
                    mean = statistics.fmean(statistics.fmean(half[s][k]) for half in halves)
                    d += sign * (by_seed[r][s] - 1 / n) * mean
                for half, weights, width in zip(halves, by_fold, widths, strict=True):
                    for f in range(width):
                        mean = statistics.fmean(half[s][k][f] for s in range(n))
                        e += sign * (weights[r][f] - 1 / width) * g(width) * mean / len(halves)
            row.append(g(n) * d + e)
        deviations.append(row)
    spread = [statistics.stdev(row[k] for row in deviations) for k in budgets]
    middle = [statistics.fmean(row[k] for row in deviations) for k in budgets]
    largest = [max(abs(row[k] - middle[k]) / spread[k] for k in budgets) for row in deviations]
    c = max(float(np.quantile(largest, 0.95)), float(stats.norm.ppf(0.975)))
    return [(a - c * s, a + c * s) for a, s in zip(centre, spread, strict=True)]


def steps_to(target: float, budgets: list[int], curve: list[float]) -> float | None:
    """The first tenth of a step at which straight lines between budgets are as high as the target."""
    for step in range(10 * budgets[-1] + 1):
        if np.interp(step / 10, budgets, curve) >= target - 1e-12:
            return step / 10
    return None


# NTL (Wang et al., ICLR 2022), pair by pair.


def mmd(x: Tensor, y: Tensor, kernels: int, multiplier: float) -> Tensor:
    """The biased estimate with a sum of Gaussian kernels; their widths from the mean distance of different samples."""
    both = [*x, *y]
    plain = [u.detach() for u in both]
    distances = [float(((u - v) ** 2).sum()) for i, u in enumerate(plain) for j, v in enumerate(plain) if i != j]
    base = sum(distances) / len(distances)
    widths = [base * multiplier ** (i - kernels // 2) for i in range(kernels)]

    def mean_kernel(one: Tensor, other: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for u in one:
            for v in other:
                for width in widths:
                    total = total + torch.exp(-((u - v) ** 2).sum() / width)
        return total / (len(one) * len(other))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def ntl(
    logits: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
    features: tuple[Tensor, Tensor],
    *,
    alpha: float,
    beta: float,
    clamp: float,
    kernels: int,
    multiplier: float,
) -> Tensor:
    """KL of the benign batch minus min(c, a KL of the restricted one) min(c, b MMD); KL from one-hot labels."""

    def kl(z: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), dtype=z.dtype)
        for row, label in zip(z, y, strict=True):
            p = torch.exp(row) / torch.exp(row).sum()
            for j in range(len(row)):
                q = 1.0 if j == label else 0.0
                if q > 0:  # 0 log 0 is 0
                    total = total + q * (math.log(q) - torch.log(p[j]))
        return total / len(z)

    benign, restricted = (kl(z, y) for z, y in zip(logits, labels, strict=True))
    one, two = alpha * restricted, beta * mmd(*features, kernels, multiplier)
    return benign - (one if one < clamp else clamp) * (two if two < clamp else clamp)


# TAR (Tamirisa et al., ICLR 2025) and RepNoise (Rosati et al., NeurIPS 2024), sample by sample.


def negative_entropy(logits: Tensor) -> Tensor:
    """TAR's tamper-resistance loss: minus the entropy of each row's probabilities, averaged."""
    rows = logits.reshape(-1, logits.shape[-1])
    total = torch.zeros((), dtype=logits.dtype)
    for z in rows:
        p = torch.exp(z) / torch.exp(z).sum()
        for j in range(len(z)):
            total = total + p[j] * torch.log(p[j])
    return total / len(rows)


def hidden_distance(states: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """TAR's representation term: squared L2 norms of differences, averaged over samples and depths."""
    total = torch.zeros((), dtype=states[0].dtype)
    for here, there in zip(states, wanted, strict=True):
        for u, v in zip(here, there, strict=True):
            total = total + sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / len(here)
    return total / len(states)


def noise_loss(states: list[Tensor], noise: list[Tensor], kernels: int, multiplier: float) -> Tensor:
    """RepNoise's noise loss: the MMD of hidden states and Gaussian samples, averaged over depths."""
    return sum(mmd(z, e, kernels, multiplier) for z, e in zip(states, noise, strict=True)) / len(states)


def ridge_probe(features: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """R2 of ridge regression from features to one-hot labels, centred; lambda is relative to the mean eigenvalue."""
    n, d = features.shape
    z = features - features.mean(0)
    classes = sorted(set(labels.tolist()))
    y = torch.stack([(labels == c).to(z.dtype) for c in classes], 1)
    y = y - y.mean(0)
    lam = ridge * (z**2).sum() / min(n, d)
    inverse = torch.linalg.inv(z.T @ z + lam * torch.eye(d, dtype=z.dtype))
    return torch.trace(y.T @ z @ inverse @ z.T @ y) / (y**2).sum()


def meta_objective(
    loss_at,
    suppression_at,
    theta: list[Tensor],
    gamma: list[float],
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> Tensor:
    """Eq. 4 for one adversary as a function of theta: fine-tune by hand, sum gamma_k L_alpha(phi_k).

    Args:
        loss_at: (parameters, k) -> the adversary's loss on its k-th batch.
        suppression_at: (parameters, k) -> L_alpha on the k-th evaluation batch.
    """
    phi, velocity, total = list(theta), [torch.zeros_like(t) for t in theta], torch.zeros((), dtype=theta[0].dtype)
    for k, weight in enumerate(gamma):
        at = [p.detach().requires_grad_() for p in phi]
        grads = [
            g + weight_decay * p.detach() for g, p in zip(torch.autograd.grad(loss_at(at, k), at), at, strict=True)
        ]
        velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
        steps = [g + momentum * v if nesterov else v for g, v in zip(grads, velocity, strict=True)]
        phi = [p.detach() - learning_rate * s for p, s in zip(phi, steps, strict=True)]
        total = total + weight * suppression_at(phi, k)
    return total


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Binkowski et al. 2018, section 4: the unbiased estimator of MMD^2, pair by pair, with KID's cubic kernel."""

    def k(x: Tensor, y: Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(k(x, y) for x in a for y in b) / (n * m)
    return within_a + within_b - 2 * across


def descended_share(features: Tensor, labels: Tensor, steps: int) -> Tensor:
    """What gradient descent on a centred linear probe has explained, step by step, its step size held fixed."""
    z = features - features.mean(0)
    y = torch.stack([(labels == c).to(z) for c in torch.unique(labels)], 1)
    y = y - y.mean(0)
    eta = 1 / torch.linalg.eigvalsh(z.detach().T @ z.detach())[-1]
    w = torch.zeros(z.shape[1], y.shape[1], dtype=z.dtype)
    for _ in range(steps):
        w = w - eta * z.T @ (z @ w - y)
    return 1 - ((z @ w - y) ** 2).sum() / (y**2).sum()


def probe_loss(features: Tensor, labels: Tensor, steps: int) -> Tensor:
    """IMMA's lower level by autograd: a linear probe trained by cross-entropy, differentiated through."""
    z = features
    eta = 2 * len(z) / torch.linalg.eigvalsh(z.detach().T @ z.detach())[-1]
    w = torch.zeros(z.shape[1], int(labels.max()) + 1, dtype=z.dtype, requires_grad=True)
    for _ in range(steps):
        loss = -torch.log_softmax(z @ w, -1)[torch.arange(len(z)), labels].mean()
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        w = w - eta * gradient
    return -torch.log_softmax(z @ w, -1)[torch.arange(len(z)), labels].mean()


def kappa_of_features(z: Tensor) -> float:
    """kappa(Z'Z) by the eigenvalues of the D x D matrix, for features of full rank."""
    values = torch.linalg.eigvalsh(z.T @ z)[-min(z.shape) :]
    return float(values[-1] / values[0])


# Text-to-image models


def edited_weight(
    weight: Tensor, erased: Tensor, targets: Tensor, preserved: Tensor, preserve_weight: float, ridge: float
) -> Tensor:
    """UCE, Eq. 7: sums of outer products, vector by vector, and an inverse."""
    left, right = ridge * weight, ridge * torch.eye(weight.shape[1], dtype=weight.dtype)
    for c, wanted in zip(erased, targets, strict=True):
        left = left + torch.outer(weight @ wanted, c)
        right = right + torch.outer(c, c)
    for c in preserved:
        left = left + preserve_weight * torch.outer(weight @ c, c)
        right = right + preserve_weight * torch.outer(c, c)
    return left @ torch.linalg.inv(right)


def editing_objective(
    edited: Tensor, weight: Tensor, erased: Tensor, targets: Tensor, preserved: Tensor, share: float, ridge: float
) -> Tensor:
    """What UCE minimises over the edited weight."""
    total = ridge * ((edited - weight) ** 2).sum()
    for c, wanted in zip(erased, targets, strict=True):
        total = total + ((edited @ c - weight @ wanted) ** 2).sum()
    for c in preserved:
        total = total + share * ((edited @ c - weight @ c) ** 2).sum()
    return total


def bilevel_ascent(
    model: nn.Module,
    moved: set[str],
    below: list[list[tuple[Tensor, Tensor]]],
    above: list[tuple[Tensor, Tensor]],
    below_rate: float,
    above_rate: float,
    prior: list[list[tuple[Tensor, Tensor]]] | None = None,
    prior_weight: float = 0.0,
) -> dict[str, Tensor]:
    """IMMA of a denoiser by plain descent and ascent, with theta and phi kept apart; phi is of all weights.

    Args:
        moved: names of theta's parameters among the model's.
        below: for each round the batches that the adaptation takes steps on.
        above: for each round the batch of the step above.
        prior: batches beside those of `below`, as DreamBooth has them; None: there are none.
        prior_weight: of the loss on these.
    """
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    phi = {n: torch.zeros_like(p) for n, p in theta.items()}

    def gradients(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        at = {n: (theta[n] + phi[n]).requires_grad_() for n in theta}
        loss = ((torch.func.functional_call(model, at, batch[0]) - batch[1]) ** 2).mean()
        return dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))

    for number, (steps, batch) in enumerate(zip(below, above, strict=True)):
        for place, step in enumerate(steps):
            slope = gradients(step)
            if prior is not None:
                beside = gradients(prior[number][place])
                slope = {n: slope[n] + prior_weight * beside[n] for n in slope}
            phi = {n: phi[n] - below_rate * slope[n] for n in phi}
        slope = gradients(batch)
        theta = {n: theta[n] + above_rate * slope[n] if n in moved else theta[n] for n in theta}
    return theta


# Language models


def token_nll(bigram: Tensor, x: Tensor, y: Tensor) -> float:
    """The mean over the tokens that count of -log p(next | present), for a model that is a table of logits."""
    total, count = 0.0, 0
    for row, targets in zip(x.tolist(), y.tolist(), strict=True):
        for token, target in zip(row, targets, strict=True):
            if target != -100:
                logits = bigram[token].double().tolist()
                total += math.log(sum(math.exp(v) for v in logits)) - logits[target]
                count += 1
    return total / count


def chosen_share(bigram: Tensor, x: Tensor, y: Tensor) -> float:
    """The share of rows whose first answer is more likely than each of the others; x and y are (N, answers, L)."""
    right = 0
    for row, targets in zip(x, y, strict=True):
        sums = [token_nll(bigram, a[None], t[None]) * int((t != -100).sum()) for a, t in zip(row, targets, strict=True)]
        right += all(sums[0] < other for other in sums[1:])
    return right / len(x)


# Text-to-image models, as the training examples of diffusers have them


def noise_error(unet: nn.Module, alpha_bar: Tensor, images: Tensor, t: Tensor, noise: Tensor, states: Tensor) -> Tensor:
    """train_text_to_image.py: add_noise, unet(...), F.mse_loss(model_pred, target, reduction="mean")."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    noisy = a**0.5 * images + (1 - a) ** 0.5 * noise
    pred = unet(noisy, t, states, return_dict=False)[0]
    return ((pred - noise) ** 2).mean()


def dreambooth_loss(unet: nn.Module, alpha_bar: Tensor, instance: tuple, prior: tuple, weight: float) -> Tensor:
    """train_dreambooth.py: both in one batch, chunked after the forward pass, loss + prior_loss_weight * prior_loss."""
    images, t, noise, states = (torch.cat(pair) for pair in zip(instance, prior, strict=True))
    a = alpha_bar[t].view(-1, 1, 1, 1)
    pred = unet(a**0.5 * images + (1 - a) ** 0.5 * noise, t, states, return_dict=False)[0]
    (pred, pred_prior), (target, target_prior) = torch.chunk(pred, 2), torch.chunk(noise, 2)
    return ((pred - target) ** 2).mean() + weight * ((pred_prior - target_prior) ** 2).mean()


def textual_inversion(
    unet: nn.Module, encode: Callable, table: nn.Parameter, new: list, batches: list, alpha_bar: Tensor, rate: float
) -> list[float]:
    """textual_inversion.py: AdamW over the whole table, whose old rows are written back after each step."""
    optimizer = torch.optim.AdamW([table], lr=rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    original, losses = table.detach().clone(), []
    for images, t, noise, ids in batches:
        loss = noise_error(unet, alpha_bar, images, t, noise, encode(ids))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        index_no_updates = torch.ones((len(table),), dtype=torch.bool)
        index_no_updates[min(new) : max(new) + 1] = False
        index_no_updates[[i for i in range(min(new), max(new) + 1) if i not in new]] = True
        with torch.no_grad():
            table[index_no_updates] = original[index_no_updates]
        losses.append(loss.item())
    return losses


def with_adapters(network: nn.Module, adapters: dict[str, tuple[Tensor, Tensor]], scale: float) -> nn.Module:
    """LoRA (Hu et al. 2022): a copy whose weights are W + scale B A."""
    merged = copy.deepcopy(network)
    with torch.no_grad():
        for name, (a, b) in adapters.items():
            weight = merged.get_parameter(f"{name}.weight")
            weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    return merged
