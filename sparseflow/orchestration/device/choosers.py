"""Choosing neurons on a device: predictors of one layer, whose weights lie there and whose answer stays there.

An answer is a mask, (n_tokens, ffn_dim) int8, 1 for a candidate of that token.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import LayerNorm
from torch.nn.functional import layer_norm

from sparseflow.kernels.bounds import CodedRows, Margin
from sparseflow.orchestration.low_rank import LowRank

if TYPE_CHECKING:
    pass

TOKENS_AT_ONCE = 8
"""A step of more tokens is computed dense."""


class Chooser(Protocol):
    """Chooses neurons of one layer."""

    nbytes: int
    """What it keeps on the device."""
    pass_nbytes: int
    """What it reads for each call, at least."""

    def choose(self, x: Tensor, mask: Tensor) -> None:
        """Fill the mask. x: (n_tokens, hidden) float32, contiguous. Does not wait for the device."""
        ...

    def normalise_and_choose(self, hidden: Tensor, norm: LayerNorm, x: Tensor, mask: Tensor) -> None:
        """The same for one token, once x is filled, (1, hidden), with the norm of the residual stream, (1, hidden)."""
        ...

    def beside(self) -> "Chooser":
        """The same, to be used while this is: with the same weights, and what is between kernels of its own."""
        ...

    def take_nbytes_beyond(self) -> int:
        """What calls have read beyond that since this was asked last. Waits for the device."""
        ...


class Mover:
    """Brings tensors to a device; what is lent there already is taken as it lies."""

    def __init__(self, device: torch.device, lent: Mapping[int, Tensor] | None = None) -> None:
        """lent: by the address in host memory of what each is a copy of."""
        self.device = device
        self._lent = lent or {}
        self.nbytes = 0
        """Of what was brought."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same there."""
        there = self._lent.get(tensor.data_ptr()) if tensor.numel() else None
        if there is None or there.shape != tensor.shape:
            self.nbytes += tensor.nbytes
            return tensor.to(self.device)
        return there


class ChooserByCodes:
    """All neurons whose upper bound, from codes of fc1, is not at most 0."""

    def __init__(
        self,
        rows: CodedRows,
        margin: Margin,
        failure_probability: float,
        threshold: float,
        planes: int,
        move: Mover,
    ) -> None:
        """As `kernels.bounds.candidates` is told; rows are moved, without the fine plane where it is not read."""
        from sparseflow.kernels.device.scoring import DeviceScorer
        from sparseflow.kernels.device.token_codes import TokenSums

        fine = rows.fine if planes > 1 else rows.fine[:0]
        there, device = CodedRows(*map(move, rows._replace(fine=fine))), move.device
        self._scorer = DeviceScorer(there, margin, failure_probability, threshold, planes)
        self._make_sums = partial(TokenSums, TOKENS_AT_ONCE, self._scorer.n_groups, device)
        self._sums = self._make_sums()  # where it is for good: a graph knows the address
        self._n_fine_rows = torch.zeros(1, dtype=torch.int64, device=device)
        self.pass_nbytes = there.nbytes_read(1, 0)
        self.nbytes = sum(tensor.nbytes for tensor in there)

    def choose(self, x: Tensor, mask: Tensor) -> None:
        """As `Chooser.choose`."""
        self._scorer.sum_tokens(x, self._sums)
        self._scorer.select(x, self._sums, mask, self._n_fine_rows)

    def normalise_and_choose(self, hidden: Tensor, norm: LayerNorm, x: Tensor, mask: Tensor) -> None:
        """As `Chooser.normalise_and_choose`."""
        self._scorer.normalise(hidden, norm.weight, norm.bias, norm.eps, x, self._sums)
        self._scorer.select(x, self._sums, mask, self._n_fine_rows)

    def beside(self) -> "ChooserByCodes":
        """As `Chooser.beside`; rows of the fine plane are counted together."""
        twin = copy.copy(self)
        twin._sums = self._make_sums()
        return twin

    def take_nbytes_beyond(self) -> int:
        """As `Chooser.take_nbytes_beyond`: rows of the fine plane."""
        n_rows = int(self._n_fine_rows)
        self._n_fine_rows.zero_()
        return self._scorer.rows.nbytes_read(0, n_rows)


class ChooserByLowRank:
    """All neurons whose score by a `LowRank` is not at most 0."""

    def __init__(self, low_rank: LowRank, move: Mover) -> None:
        self._low_rank = LowRank(move(low_rank.down), move(low_rank.up), move(low_rank.bias), low_rank.has_relu)
        self.nbytes = self.pass_nbytes = self._low_rank.nbytes

    def choose(self, x: Tensor, mask: Tensor) -> None:
        """As `Chooser.choose`."""
        torch.logical_not(self._low_rank.scores(x) <= 0, out=mask)

    def normalise_and_choose(self, hidden: Tensor, norm: LayerNorm, x: Tensor, mask: Tensor) -> None:
        """As `Chooser.normalise_and_choose`."""
        from sparseflow.kernels.device.norm import normalise

        normalise(hidden, norm.weight, norm.bias, norm.eps, x)
        self.choose(x, mask)

    def beside(self) -> "ChooserByLowRank":
        """As `Chooser.beside`."""
        return self

    def take_nbytes_beyond(self) -> int:
        """As `Chooser.take_nbytes_beyond`."""
        return 0


class Selector(Protocol):
    """What is asked of a layer's predictor on the CPU."""

    nbytes_read: int

    def select(self, x: Tensor) -> NDArray[np.uint32]:
        """As `NeuronPredictor.select`."""
        ...


class ChooserOnHost:
    """A predictor of the CPU, for device slots that are kept on one."""

    nbytes = 0
    pass_nbytes = 0

    def __init__(self, predictor: Selector) -> None:
        self._predictor = predictor
        self._nbytes_read = 0

    def choose(self, x: Tensor, mask: Tensor) -> None:
        """As `Chooser.choose`: for the first token, what any of them needs."""
        before = self._predictor.nbytes_read
        ids = self._predictor.select(x)
        self._nbytes_read += self._predictor.nbytes_read - before
        mask.zero_()
        mask[0, torch.from_numpy(ids.astype(np.int64))] = 1

    def normalise_and_choose(self, hidden: Tensor, norm: LayerNorm, x: Tensor, mask: Tensor) -> None:
        """As `Chooser.normalise_and_choose`."""
        x.copy_(layer_norm(hidden.float(), norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps))
        self.choose(x, mask)

    def beside(self) -> "ChooserOnHost":
        """As `Chooser.beside`."""
        return self

    def take_nbytes_beyond(self) -> int:
        """As `Chooser.take_nbytes_beyond`."""
        n, self._nbytes_read = self._nbytes_read, 0
        return n
