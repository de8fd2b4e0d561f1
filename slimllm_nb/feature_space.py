"""Lengths in feature space (paper eqs. 5-7) without the eigendecomposition that a wide layer spends its time in.

The squared length of a row w of W_down is w' f(S) w: S is the scatter matrix over its mean variance, and f(x) is
sigmoid(x)^2. A function of a matrix needs no eigenvectors. The few outlying variances are split off (block Krylov);
what remains has its spectrum in [0, L], which a Cholesky factorisation of L - S proves. There a Chebyshev polynomial of
low degree is close to f, by a bound known beforehand (the tail of its series), and costs a few products. That settles
nearly every channel; the ones whose bound leaves open whether they go are computed to the last digits by Lanczos
quadrature (Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 3).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import chebyshev
from torch import Tensor

from slimllm_nb import channels
from slimllm_nb.approximate import Approximate
from slimllm_nb.symmetric import product, quadratic_forms

# Degrees to choose from, and the Chebyshev polynomials T_2 .. T_s that the evaluation multiplies out (Paterson and
# Stockmeyer, 1973): degree 5 takes 3 products of matrices, 8 takes 4, 11 and 15 one more each.
DEGREES = {5: 3, 8: 3, 11: 4, 15: 4}
WANTED = 1e-3  # of f; a higher degree would cost more than the channels left open do
LARGEST = 2e-2  # above it too much would be left open
EXACT = 1e-13
BLOCK, STEPS = 16, 12  # of the block Krylov space that finds outliers


def approximate_lengths(
    scatter: Float[Tensor, "hidden hidden"], down_weight: Float[Tensor, "hidden intermediate"]
) -> Approximate:
    """channels.direction_importance within bounds. Where the spectrum is too wide for a polynomial, it is exact."""
    spectrum = _Spectrum.of(scatter)
    degree = spectrum and _degree(spectrum.largest)
    if degree is None:
        return _exact(scatter, down_weight)
    matrix = spectrum.polynomial(degree)
    vectors = down_weight.to(matrix.dtype)
    squares = quadratic_forms(matrix, vectors)
    plain = torch.linalg.vector_norm(vectors, dim=0).double()
    # What float32 adds: sqrt(n) units in the last place of every product (Higham and Mary, 2019), times 32 to be safe.
    rounding = 32 * torch.finfo(matrix.dtype).eps * len(matrix) ** 0.5
    error = (_tail(spectrum.largest, degree) + rounding) * plain.square()
    values = squares.clamp(min=plain.square() / 4, max=plain.square()).sqrt()  # f lies between 1/4 and 1
    bounds = error / (values + plain / 2).clamp_min(torch.finfo(values.dtype).tiny)

    def exactly(some: Tensor) -> Tensor:
        steps = _quadrature_steps(spectrum.largest)
        if len(some) * steps > 8 * len(scatter):  # an eigendecomposition costs less
            return channels.direction_importance(scatter, down_weight[:, some])
        return spectrum.quadrature(down_weight[:, some].double(), steps)

    return Approximate(values, bounds, exactly)


def _exact(scatter: Tensor, down_weight: Tensor) -> Approximate:
    values = channels.direction_importance(scatter, down_weight)
    return Approximate(values, torch.zeros_like(values), lambda some: values[some])


def f(x):
    """What the squared length weights a direction with; x: its variance over the mean variance."""
    return 1 / (1 + np.exp(-x)) ** 2 if isinstance(x, np.ndarray | float) else torch.sigmoid(x).square()


@cache
def _series(largest: float) -> np.ndarray:
    """Chebyshev coefficients of f on [0, largest]; what is beyond them is rounding."""
    return chebyshev.chebinterpolate(lambda t: f((t + 1) * largest / 2), 40 + int(12 * largest**0.5))


def _tail(largest: float, degree: int) -> float:
    """The most by which the series, cut off behind `degree`, differs from f anywhere on [0, largest]."""
    return float(np.abs(_series(largest)[degree + 1 :]).sum()) + 1e-15


def _degree(largest: float) -> int | None:
    """The lowest that is close enough; None: none is."""
    for degree in DEGREES:
        if _tail(largest, degree) <= (LARGEST if degree == max(DEGREES) else WANTED):
            return degree
    return None


def _quadrature_steps(largest: float) -> int:
    """k steps integrate polynomials of degree 2 k - 1 exactly, so they err by no more than twice the tail behind it."""
    steps = 2
    while 2 * _tail(largest, 2 * steps - 1) > EXACT and 2 * steps < len(_series(largest)):
        steps += 1
    return steps


@dataclass(frozen=True)
class _Spectrum:
    """S = outlying pairs + `rest`, and the spectrum of the rest lies in [0, largest]; all over the mean variance."""

    rest: Float[Tensor, "hidden hidden"]
    largest: float
    values: Float[Tensor, "outliers"]
    vectors: Float[Tensor, "hidden outliers"]

    @classmethod
    def of(cls, scatter: Float[Tensor, "hidden hidden"]) -> "_Spectrum | None":
        """None: nothing varies, or no bound was found."""
        mean = scatter.diagonal().mean()
        if not mean > 0:
            return None
        rest = scatter / mean
        values, vectors, estimate = _outliers(rest)
        if len(values):
            rest.addmm_(vectors * values, vectors.T, alpha=-1)
        for margin in (1.02, 1.1, 1.3):
            largest = _rounded_up(float(estimate) * margin)
            if _is_below(rest, largest):
                return cls(rest, largest, values, vectors)
        return None

    def polynomial(self, degree: int) -> Float[Tensor, "hidden hidden"]:
        """p(S) in float32, p close to f, with the outliers as f says."""
        series = _series(self.largest)[: degree + 1]
        t = (self.rest * (2 / self.largest)).float()
        t.diagonal().sub_(1)
        first = [None, t]  # T_0, T_1, ... up to T_s: T_k+1 = 2 t T_k - T_k-1
        for _ in range(DEGREES[degree] - 1):
            following = product(first[1], first[-1]).mul_(2)
            if first[-2] is None:
                following.diagonal().sub_(1)
            else:
                following.sub_(first[-2])
            first.append(following)
        pieces, divisor = [], [0] * (len(first) - 1) + [1]
        while len(series) >= len(divisor):
            series, remainder = chebyshev.chebdiv(series, divisor)
            pieces.append(remainder)
        pieces.append(series)

        def combined(coefficients) -> Tensor:
            total = torch.zeros_like(t)
            for coefficient, one in zip(coefficients[1:], first[1:-1], strict=False):
                total.add_(one, alpha=float(coefficient))
            total.diagonal().add_(float(coefficients[0]))
            return total

        total = combined(pieces[-1])
        for coefficients in pieces[-2::-1]:  # Horner's rule in T_s
            total = product(first[-1], total).add_(combined(coefficients))
        if len(self.values):
            at_zero = chebyshev.chebval(-1.0, _series(self.largest)[: degree + 1])
            vectors = self.vectors.float()
            total.addmm_(vectors * (f(self.values) - at_zero).float(), vectors.T)
        return total

    def quadrature(self, vectors: Float[Tensor, "hidden some"], steps: int) -> Float[Tensor, "some"]:
        """sqrt(w' f(S) w) for every column w: Lanczos' three-term recurrence for all of them side by side, float64."""
        norms = vectors.norm(dim=0)
        tiny = torch.finfo(norms.dtype).tiny
        current, previous = vectors / norms.clamp_min(tiny), torch.zeros_like(vectors)
        tridiagonal = norms.new_zeros(len(norms), steps, steps)
        off = torch.zeros_like(norms)
        for step in range(steps):
            following = (self.rest @ current).sub_(off * previous)
            on = (following * current).sum(0)
            tridiagonal[:, step, step] = on
            following.sub_(on * current)
            off = following.norm(dim=0)
            # Where the space is exhausted, nothing follows.
            off = torch.where(off > 1e-12 * self.largest, off, 0)
            if step + 1 < steps:
                tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = off
            previous, current = current, torch.where(off > 0, following / off.clamp_min(tiny), 0)
        nodes, turned = torch.linalg.eigh(tridiagonal)
        squares = norms.square() * (turned[:, 0].square() * f(nodes)).sum(1)
        if len(self.values):
            along = self.vectors.T @ vectors
            squares += ((f(self.values) - f(0.0))[:, None] * along.square()).sum(0)
        return squares.sqrt()


def _rounded_up(value: float) -> float:
    """To two digits, so that few series are computed."""
    digits = 10 ** (np.floor(np.log10(max(value, 1e-3))) - 1)
    return float(np.ceil(value / digits) * digits)


def _is_below(matrix: Float[Tensor, "width width"], bound: float) -> bool:
    """Whether all eigenvalues are: by a Cholesky factorisation, in float32, of which the margin takes the rounding."""
    lower = matrix.float().neg_()
    lower.diagonal().add_(bound)
    return int(torch.linalg.cholesky_ex(lower).info) == 0


def _outliers(matrix: Float[Tensor, "width width"]) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenpairs of the largest eigenvalues, as far as a block Krylov space has them to the last digits; an estimate of
    the largest eigenvalue that is left."""
    width = len(matrix)
    block = min(BLOCK, width)
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(width, block, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis, images = matrix.new_empty(width, 0), matrix.new_empty(width, 0)
    for _ in range(min(STEPS, width // block)):
        for _ in range(2):  # twice is enough
            current = torch.linalg.qr(current - basis @ (basis.T @ current)).Q
        image = matrix @ current
        basis, images = torch.cat([basis, current], 1), torch.cat([images, image], 1)
        current = image
    values, turned = torch.linalg.eigh(basis.T @ images)
    values, turned = values.flip(0), turned.flip(1)
    vectors = basis @ turned
    residuals = (images @ turned - vectors * values).norm(dim=0)
    # All up to the first that is not there yet; of the bulk none are.
    found = int((residuals <= 1e-10 * values[0]).long().cumprod(0).sum())
    found = min(found, len(values) - 1)
    return values[:found].clone(), vectors[:, :found].contiguous(), values[found] + residuals[found]
