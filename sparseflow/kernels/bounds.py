"""Which neurons can be active: an upper bound on every pre-activation, from low-bit codes of fc1 alone.

With fc1's rows w_i = w^_i + e_i, where w^_i is the coded row and e_i its rounding error, and x = x^ + r, where x^ is x
in 16-bit steps:

    w_i . x + b_i  <=  w^_i . x^ + b_i  +  margin_i  +  ||w^_i|| (||r|| + float error)

`certified`: margin_i = ||e_i|| ||x|| (Cauchy-Schwarz): never too small.
`exact`: margin_i = sqrt(ln(1/d) / 6 * sum_g s_ig^2 ||x_g||^2): too small with probability d at most, for one neuron and
one token. Subtractive dither makes the errors e_ij uniform on a width of s_ig, independent of each other and of x; such
an error has E exp(t e) = sinh(t s/2) / (t s/2) <= exp(t^2 s^2 / 24), and Chernoff's bound on their sum is this margin.
It is 1.73 times smaller than Hoeffding's, which holds for any error of that width.

The coarse plane of the codes bounds every neuron, and the fine plane, with steps a sixteenth as wide, those that it has
not settled; d is halved between the two. A neuron whose last bound is not <= 0 is a candidate; so a NaN is one.
`candidates_ref` and `upper_bounds_ref` are the slow twins.
"""

import enum
import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.kernels import scoring, threads
from sparseflow.kernels.intrinsics import LANES
from sparseflow.store.codes import CODES_PER_WORD, DITHER_UNIT, FINE_STEPS, GROUP, ROW_GROUP_WORDS

# Head-room over the rounding of margins, which are float64, and of the codes' norms.
_MARGIN_SLACK = 1 + 2.0**-20


class Margin(enum.IntEnum):
    """Which margin is added to the score."""

    CERTIFIED = 0
    EXACT = 1


class CodedRows(NamedTuple):
    """fc1 of one layer as `store.codes` codes it. All contiguous.

    dither: (n_groups * GROUP,) float32, zero beyond hidden. coarse, fine: (ffn_dim, n_groups * GROUP / 4) int16,
    four codes a word. scales: (ffn_dim, n_groups) float32. bias: (ffn_dim,) float32, fc1's. norms: (ffn_dim,) float32,
    ||w^_i|| or more. coarse_error_norms, fine_error_norms: (ffn_dim,) float32, ||e_i|| or more.
    """

    dither: Tensor
    coarse: Tensor
    fine: Tensor
    scales: Tensor
    bias: Tensor
    norms: Tensor
    coarse_error_norms: Tensor
    fine_error_norms: Tensor

    def nbytes_read(self, n_passes: int, n_fine_rows: int) -> int:
        """Bytes read where all coarse rows are read so many times, and so many fine rows; fc1's bias apart."""
        per_pass = (self.dither, self.coarse, self.scales, self.norms, self.coarse_error_norms)
        return n_passes * sum(t.nbytes for t in per_pass) + n_fine_rows * (self.fine.shape[1] * 2 + 4)


def candidates(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> NDArray[np.uint32]:
    """Neurons whose pre-activation may be above 0 for at least one token, on torch's threads.

    Args:
        rows: the layer's codes.
        x: (n_tokens, hidden) float32, contiguous: the inputs of fc1.
        margin: which bound.
        failure_probability: d, for one neuron and one token; used by `Margin.EXACT` alone.
        threshold: multiplies all margins; 1.0 is the bound as stated. Any finite number.
        planes: 2; or 1: the coarse plane decides alone.

    Returns:
        (n,) uint32, ascending.
    """
    return Scorer(rows, margin, failure_probability, threshold, planes).select(x)[0]


def upper_bounds(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> Tensor:
    """The bounds themselves, (n_tokens, ffn_dim) float32: a neuron is a candidate where its bound is not <= 0.

    Each is the last one computed: the coarse plane's where that settles the neuron for this token.
    """
    return torch.from_numpy(Scorer(rows, margin, failure_probability, threshold, planes).bounds(x)[0])


class Layout(NamedTuple):
    """An argument block for one number of threads and tokens, and the size of the scratch memory that it divides."""

    n_threads: int
    n_tokens: int
    block: NDArray[np.int64]
    nbytes: int


class Scorer:
    """Bounds of one layer's neurons, always in the same way, with all that does not change from call to call."""

    def __init__(
        self, rows: CodedRows, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
    ) -> None:
        """As `candidates` is told."""
        n_neurons, n_groups = rows.scales.shape
        self._rows = rows  # whose addresses the block has
        factor = _factor(margin, failure_probability, len(rows.dither))
        float_unit = (n_groups + 24) * 2.0**-22  # sums of n_groups terms in 16 lanes, 2.5 ||w^|| ||x|| large
        self._settings = np.array([margin, factor, threshold, planes, float_unit])
        self._shape = n_neurons, n_groups
        weights = (rows.coarse, rows.fine, rows.scales, rows.bias, rows.norms)
        self._block = np.zeros(scoring.N_FIELDS, np.int64)
        self._block[scoring.N_NEURONS], self._block[scoring.N_GROUPS] = n_neurons, n_groups
        addresses = [t.data_ptr() for t in (*weights, rows.coarse_error_norms, rows.fine_error_norms, rows.dither)]
        self._block[scoring.COARSE : scoring.DITHER + 1] = addresses
        self._block[scoring.SETTINGS] = self._settings.ctypes.data
        self._block[scoring.KERNEL] = scoring.kernel().address
        self._layout = self.layout(1, 1)
        self._pass_nbytes, self._row_nbytes = rows.nbytes_read(1, 0), rows.nbytes_read(0, 1)

    def select(self, x: Tensor) -> tuple[NDArray[np.uint32], int]:
        """Candidates, and how many rows of the fine plane were read. x: as `candidates` is told.

        A neuron is done with once it is a candidate for one token.
        """
        scratch, block = self._scored(x, needs_all=False)
        n_found, n_fine_rows = scratch[:16].view(np.int64).tolist()
        ids = int(block[scoring.IDS])
        return scratch[ids : ids + 4 * n_found].view(np.uint32), n_fine_rows

    def bounds(self, x: Tensor) -> tuple[NDArray[np.float32], int]:
        """The last bound of every neuron for every token, (n_tokens, ffn_dim); and how many rows of the fine plane were
        read, each token counted as if it were alone.
        """
        scratch, block = self._scored(x, needs_all=True)
        _, n_fine_rows = scratch[:16].view(np.int64).tolist()
        bounds, (n_neurons, _) = int(block[scoring.BOUNDS]), self._shape
        found = scratch[bounds : bounds + 4 * len(x) * n_neurons].view(np.float32)
        return found.reshape(len(x), n_neurons), n_fine_rows

    def _scored(self, x: Tensor, *, needs_all: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The scratch memory that the kernel has filled, its counts first, and the block that says what lies where."""
        n_tokens, hidden = x.shape
        layout = self._layout
        if (torch.get_num_threads(), n_tokens) != (layout.n_threads, layout.n_tokens):
            layout = self._layout = self.layout(torch.get_num_threads(), n_tokens)
        scratch = np.empty(layout.nbytes, np.uint8)
        block = layout.block.copy()
        block[scoring.HIDDEN], block[scoring.NEEDS_ALL], block[scoring.X] = hidden, needs_all, x.data_ptr()
        block[scoring.SCRATCH] = threads.address_of(scratch)
        threads.run_serial(scoring.team_kernel(), block)
        return scratch, block

    def layout(self, n_threads: int, n_tokens: int) -> Layout:
        """For a call; HIDDEN, NEEDS_ALL, X and SCRATCH are left to set."""
        n_neurons, n_groups = self._shape
        n_places = n_threads * n_tokens * n_groups
        of_tokens = (2 * GROUP * n_places, 4 * LANES * n_places, 4 * n_places, *[8 * n_places] * 3)
        sizes = (
            *(16 * n_threads * scoring.PARTS_A_THREAD, 4 * n_tokens * n_neurons, 4 * n_neurons),
            *(*of_tokens, 16 * n_threads * n_tokens, 8 * n_tokens * n_neurons),
        )
        *starts, end = itertools.accumulate((-(-size // 64) * 64 for size in sizes), initial=0)
        block = self._block.copy()
        block[scoring.N_THREADS], block[scoring.N_TOKENS] = n_threads, n_tokens
        block[scoring.COUNTS : scoring.SCORES + 1] = starts
        return Layout(n_threads, n_tokens, block, end)

    def nbytes_read(self, n_passes: int, n_fine_rows: int) -> int:
        """As `CodedRows.nbytes_read`."""
        return n_passes * self._pass_nbytes + n_fine_rows * self._row_nbytes


def _factor(margin: Margin, failure_probability: float, n_columns: int) -> float:
    """Of the margin in the fine plane; a step of the coarse plane is FINE_STEPS as wide."""
    if margin is Margin.CERTIFIED:
        return _MARGIN_SLACK
    # A dither in units of 2**-20 makes an error that is within a unit of a uniform one: by ||.||_1 <= sqrt(n) ||.||.
    discreteness = DITHER_UNIT * np.sqrt(n_columns)
    return float(np.sqrt(np.log(2 / failure_probability) / 6) + discreteness) * _MARGIN_SLACK


def candidates_ref(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> NDArray[np.uint32]:
    """The same bounds in float64 without quantising x: never a neuron more than `candidates`, few fewer."""
    bound = upper_bounds_ref(rows, x, margin, failure_probability, threshold, planes)
    return torch.nonzero((~(bound <= 0)).any(0)).flatten().numpy().astype(np.uint32)


def upper_bounds_ref(
    rows: CodedRows, x: Tensor, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
) -> Tensor:
    """(n_tokens, ffn_dim) float64."""
    n_groups = rows.scales.shape[1]
    padded = torch.nn.functional.pad(x.double(), (0, n_groups * GROUP - x.shape[1]))
    width = torch.sqrt(padded.unflatten(1, (n_groups, GROUP)).square().sum(2) @ rows.scales.double().square().T)
    factor = np.sqrt(np.log(2 / failure_probability) / 6)

    def bound(coded: Tensor, step: int, error_norms: Tensor) -> Tensor:
        score = padded @ coded.T + rows.bias.double()  # (n_tokens, ffn_dim)
        certified = error_norms.double() * padded.norm(dim=1, keepdim=True)
        return score + threshold * (factor * step * width if margin is Margin.EXACT else certified)

    coarse, fine = decoded(rows)
    first = bound(coarse, FINE_STEPS, rows.coarse_error_norms)
    return first if planes == 1 else torch.where(first <= 0, first, bound(fine, 1, rows.fine_error_norms))


def decoded(rows: CodedRows) -> tuple[Tensor, Tensor]:
    """The rows that the coarse codes stand for, and those that both planes do: (ffn_dim, n_groups * GROUP) float64.

    What they hold beyond hidden stands for nothing.
    """
    steps = rows.scales.double().repeat_interleave(GROUP, 1)
    dither = rows.dither.double()
    upper, lower = _unpacked(rows.coarse) - FINE_STEPS / 2, _unpacked(rows.fine)
    coarse = FINE_STEPS * upper - dither
    return steps * (coarse + FINE_STEPS / 2), steps * (coarse + lower + 0.5)


def _unpacked(plane: Tensor) -> Tensor:
    """(n, n_groups * GROUP) float64: the codes, from 0 to 15."""
    words = plane.unflatten(1, (-1, ROW_GROUP_WORDS)).int()
    return torch.cat([words >> 4 * place & 15 for place in range(CODES_PER_WORD)], 2).flatten(1).double()
