"""Predictors that need no training: the best linear guess of a rank at all pre-activations, from what text shows.

With z = W x + b the pre-activations and n what the predictor sees (x itself, or the residual stream earlier), the guess
of rank r with the least squared error is reduced-rank regression (Izenman 1975): C_nn = L L', M = W C_xn L^-T, and the
r largest singular vectors of M. For n = x this is the singular value decomposition of W after whitening. What the guess
leaves open has a known spread for each neuron; calibration adds a multiple of it to the bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseflow.orchestration.low_rank import LowRank, half_precision

_RIDGE = 1e-4  # of the mean variance: keeps directions that text hardly shows from being trusted


class Moments:
    """Means and products of x and n over tokens, for one layer and one view of it."""

    def __init__(self, hidden: int) -> None:
        self._n_tokens = 0
        self._sums = torch.zeros(2, hidden, dtype=torch.float64)
        self._products = torch.zeros(3, hidden, hidden, dtype=torch.float64)  # xx, xn, nn

    def add(self, x: Tensor, n: Tensor) -> None:
        """x, n: (n_tokens, hidden) float32."""
        self._n_tokens += len(x)
        self._sums += torch.stack((x.double().sum(0), n.double().sum(0)))
        self._products += torch.stack((x.T @ x, x.T @ n, n.T @ n)).double()

    def fit(self, weight: Tensor, bias: Tensor) -> "ReducedRank":
        """weight: (ffn_dim, hidden), bias: (ffn_dim,): fc1's."""
        mean_x, mean_n = self._sums / self._n_tokens
        xx, xn, nn = self._products / self._n_tokens
        xx, xn = xx - torch.outer(mean_x, mean_x), xn - torch.outer(mean_x, mean_n)
        nn = nn - torch.outer(mean_n, mean_n)
        ridge = _RIDGE * nn.diagonal().mean() + torch.finfo(torch.float64).tiny
        nn = nn + ridge * torch.eye(len(nn), dtype=torch.float64)
        factor = torch.linalg.cholesky(nn)
        wide = weight.double()
        whitened = torch.linalg.solve_triangular(factor, (wide @ xn).T, upper=False).T  # M: (ffn_dim, hidden)
        _, vectors = torch.linalg.eigh(whitened.T @ whitened)  # ascending
        vectors = vectors.flip(1)
        variance = ((wide @ xx) * wide).sum(1)
        return ReducedRank(
            torch.linalg.solve_triangular(factor.T, vectors, upper=True).T,
            whitened @ vectors,
            wide @ mean_x + bias.double(),
            mean_n,
            variance,
        )


@dataclass(frozen=True, slots=True)
class ReducedRank:
    """Guesses of every rank. down: (hidden, hidden), up: (ffn_dim, hidden): the first r rows and columns make rank r.

    mean_z: (ffn_dim,), mean_n: (hidden,), variance: (ffn_dim,) of the pre-activations. All float64.
    """

    down: Tensor
    up: Tensor
    mean_z: Tensor
    mean_n: Tensor
    variance: Tensor

    def predictor(self, rank: int) -> LowRank:
        """The guess of a rank, as it is stored."""
        down, up = half_precision(self.down[:rank], self.up[:, :rank])
        bias = self.mean_z - up.double() @ (down.double() @ self.mean_n)
        return LowRank(down, up, bias.float())

    def spread(self, rank: int) -> Tensor:
        """(ffn_dim,) float32: standard deviation of what the guess leaves open, never quite 0."""
        left = self.variance - self.up[:, :rank].square().sum(1)
        return left.clamp_min(0).sqrt().float().clamp_min(1e-6 * float(self.variance.max().sqrt()) + 1e-12)
