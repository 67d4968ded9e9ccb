"""The MLP of one token whose bundles all lie in memory, in one call: bounds of all neurons, then those chosen.

The same as `bounds.Scorer.select` and `sparse_mlp` one after the other, which are the slow twin; what Python takes
between them is a seventh of what both take.
"""

import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.kernels import scoring, sparse_mlp, threads
from sparseflow.kernels.bounds import Scorer
from sparseflow.kernels.intrinsics import DIGEST, advance, int64_at
from sparseflow.kernels.threads import compile_kernel, run_team

_DIGEST = zlib.crc32(Path(scoring.__file__).read_bytes() + Path(sparse_mlp.__file__).read_bytes(), DIGEST) | 1

# The argument block: that of scoring, then that of the sparse MLP.
_MLP = scoring.N_FIELDS


class Stepped(NamedTuple):
    """y: (1, hidden) float32. ids: (n,) uint32, ascending, those computed. n_active: of these."""

    y: Tensor
    ids: NDArray[np.uint32]
    n_active: int
    n_fine_rows: int
    """Of the codes, that were read."""


@cache
def _kernel() -> Any:
    """Compiled on first use."""
    digest = _DIGEST

    def score_and_compute(args):
        block = int64_at(args)
        if digest:
            run_team(block[scoring.KERNEL], args, block[scoring.N_THREADS], 0)
            scoring.join(block)
            mlp, scratch = advance(block, _MLP), block[scoring.SCRATCH]
            mlp[sparse_mlp.N_NEURONS] = int64_at(scratch + block[scoring.COUNTS])[0]
            mlp[sparse_mlp.IDS] = mlp[sparse_mlp.SLOTS] = scratch + block[scoring.IDS]
            mlp[sparse_mlp.SUMS] += scratch
            mlp[sparse_mlp.N_ACTIVE] += scratch
            mlp[sparse_mlp.X] = block[scoring.X]
            run_team(mlp[sparse_mlp.KERNEL], args + 8 * _MLP, mlp[sparse_mlp.N_THREADS], 0)
            sparse_mlp.join(mlp)

    return compile_kernel(score_and_compute)


class MLPStep:
    """One layer's, with all that does not change from token to token."""

    def __init__(self, scorer: Scorer, fc1_bias: Tensor, fc2_bias: Tensor) -> None:
        """
        Args:
            scorer: of the layer.
            fc1_bias, fc2_bias: (ffn_dim,) and (hidden,) float32.
        """
        self.scorer = scorer
        self._held = fc1_bias, fc2_bias  # whose addresses the block has
        self._hidden = len(fc2_bias)
        block = self._mlp_block = np.zeros(sparse_mlp.N_FIELDS, np.int64)
        block[sparse_mlp.N_TOKENS], block[sparse_mlp.HIDDEN] = 1, self._hidden
        block[sparse_mlp.FC1_BIAS], block[sparse_mlp.FC2_BIAS] = fc1_bias.data_ptr(), fc2_bias.data_ptr()
        self._use_threads(1)

    def _use_threads(self, n_threads: int) -> None:
        """Lay out the block, and the scratch memory: scoring's first."""
        layout = self.scorer.layout(n_threads, 1)
        self._n_threads = n_threads
        self._nbytes = layout.nbytes + sparse_mlp.scratch_nbytes(n_threads, 1, self._hidden)
        self._block = np.concatenate([layout.block, self._mlp_block])
        self._block[scoring.HIDDEN] = self._hidden
        mlp = self._block[_MLP:]
        mlp[sparse_mlp.N_THREADS] = n_threads
        mlp[sparse_mlp.SUMS :] = sparse_mlp.scratch_fields(n_threads, 1, self._hidden, layout.nbytes)
        self._ids, self._n_active = int(self._block[scoring.IDS]), int(mlp[sparse_mlp.N_ACTIVE])

    def __call__(self, x: Tensor, bundles: Tensor) -> Stepped:
        """
        Args:
            x: (1, hidden) float32, contiguous.
            bundles: (ffn_dim, 2, hidden) float16, bfloat16 or float32, as `sparse_mlp` is told; in the order of ids.
        """
        if self._n_threads != torch.get_num_threads():
            self._use_threads(torch.get_num_threads())
        kernel = sparse_mlp.kernel(bundles.dtype)
        scratch, y = np.empty(self._nbytes, np.uint8), torch.empty(1, self._hidden)
        block = self._block.copy()
        block[scoring.X], block[scoring.SCRATCH] = x.data_ptr(), threads.address_of(scratch)
        block[_MLP + sparse_mlp.BUNDLES], block[_MLP + sparse_mlp.STRIDE] = bundles.data_ptr(), bundles.stride(0)
        block[_MLP + sparse_mlp.KERNEL], block[_MLP + sparse_mlp.Y] = kernel.address, y.data_ptr()
        threads.run_serial(_kernel(), block)
        n_found, n_fine_rows = scratch[:16].view(np.int64).tolist()
        n_active = int(scratch[self._n_active : self._n_active + 8].view(np.int64)[0])
        ids = scratch[self._ids : self._ids + 4 * n_found].view(np.uint32)
        return Stepped(y, ids, n_active, n_fine_rows)
