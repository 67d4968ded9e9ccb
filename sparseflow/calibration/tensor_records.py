"""What calibration stores of a layer's codes and activity, computed with tensors on any device.

`LayerFitter` and `activity_statistics` are the twins, which work on the CPU and part after part.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseflow.calibration.cuts import RECALLS, Cuts, fit_cuts
from sparseflow.engine import budgets
from sparseflow.kernels.bounds import CodedRows, decoded
from sparseflow.store import calibration as stored
from sparseflow.store.codes import DITHER_UNIT, FINE_STEPS, GROUP, group_count

CURVE_TOKENS = 4096  # whose uses of neurons make a miss curve, as many as `sparseflow calibrate` takes
NEURONS_AT_ONCE = 2048  # whose codes exist in float64


@dataclass(frozen=True, slots=True)
class PlaneScores:
    """What a layer's codes say of some tokens under `exact`, computed where the codes are.

    Each (n_tokens, ffn) float32. A neuron's bound is its score and `cut` times its margin, 1.0 being that of `exact`:
    `kernels.bounds` says how, and its kernel is the twin.
    """

    coarse: Tensor
    coarse_margin: Tensor
    fine: Tensor
    fine_margin: Tensor

    @classmethod
    def of(cls, rows: CodedRows, x: Tensor, failure_probability: float) -> "PlaneScores":
        """x: (n_tokens, hidden) float32."""
        n_groups = group_count(x.shape[1])
        grouped = torch.nn.functional.pad(x, (0, n_groups * GROUP - x.shape[1])).unflatten(1, (n_groups, GROUP))
        step = grouped.abs().amax(2, keepdim=True) / 32767
        quantised = (step * torch.round(grouped / step.clamp_min(1e-30))).double()
        squares = grouped.double().square().sum(2)
        residual = (grouped.double() - quantised).square().sum((1, 2)).sqrt()
        float_unit = (n_groups + 24) * 2.0**-22
        errors = (residual + float_unit * squares.sum(1).sqrt())[:, None]
        factor = math.sqrt(math.log(2 / failure_probability) / 6) + DITHER_UNIT * math.sqrt(n_groups * GROUP)
        parts = []
        for start in range(0, len(rows.bias), NEURONS_AT_ONCE):
            one = rows._replace(
                **{name: t[start : start + NEURONS_AT_ONCE] for name, t in rows._asdict().items() if name != "dither"}
            )
            width = torch.sqrt(squares @ one.scales.double().square().T)  # (n_tokens, neurons)
            common = errors * one.norms.double()
            found = []
            for coded, n_steps in zip(decoded(one), (FINE_STEPS, 1), strict=True):
                found.append(quantised.flatten(1) @ coded.T + one.bias.double())
                found.append(factor * n_steps * width + common)
            parts.append([values.float() for values in found])
        return cls(*(torch.cat(values, 1) for values in zip(*parts, strict=True)))


def code_records(rows: CodedRows, scores: PlaneScores, active: Tensor) -> dict[str, stored.PredictorRecord]:
    """As `LayerFitter` of `sparseflow calibrate` has them for `coarse` and `codes`.

    active: (n_tokens, ffn) bool, the tokens of `scores`.
    """
    n_tokens, n_pairs, n_active = len(active), active.numel(), count(active)
    spread = scores.coarse_margin.clamp_min(1e-30)
    of_active = scores.coarse[active].cpu(), spread[active].cpu(), torch.ones(n_active, dtype=torch.bool)
    needed = -scores.coarse / spread
    coarse = fit_cuts(*of_active)
    shares = [count(needed < cut) / n_pairs if n_active else 0.0 for cut in coarse.cuts]
    missed_by_coarse = tuple(1 - 0.9 * (1 - recall) for recall in RECALLS)
    cuts = fit_cuts(*of_active, missed_by_coarse).cuts
    both, nbytes = Cuts(cuts, [], []), []
    for cut in cuts:
        is_open = ~(scores.coarse + cut * scores.coarse_margin <= 0)
        is_chosen = is_open & ~(scores.fine + cut * scores.fine_margin <= 0)
        nbytes.append(rows.nbytes_read(n_tokens, count(is_open)) / n_tokens)
        both.candidate_shares.append(count(is_chosen) / n_pairs)
        both.found.append(count(is_chosen & active) / n_active if n_active else 1.0)
    coarse_nbytes = [float(rows.nbytes_read(1, 0))] * len(RECALLS)
    return {
        "coarse": stored.PredictorRecord(coarse_nbytes, None, *coarse._replace(candidate_shares=shares)),
        "codes": stored.PredictorRecord(nbytes, None, *both),
    }


def count(where: Tensor) -> int:
    """How many are true."""
    return int(torch.count_nonzero(where))


def layer_statistics(active: Tensor, n_text_tokens: int) -> dict[str, Any]:
    """As `sparseflow calibrate` has them in a `LayerRecord`. active: (texts * tokens, ffn) bool."""
    by_text = active.unflatten(0, (-1, n_text_tokens))
    before, after = by_text[:, :-1], by_text[:, 1:]
    n_before = count(before)
    counts = active.sum(0)
    return {
        "active_share": int(counts.sum()) / active.numel(),
        "overlap": count(before & after) / n_before if n_before else 0.0,
        "active_counts": counts.tolist(),
        "miss_curve": miss_curve(active[:CURVE_TOKENS]),
    }


def miss_curve(active: Tensor) -> list[float]:
    """`engine.budgets.miss_curve`, on the device of `active`: (n_tokens, ffn) bool.

    A neuron's place in the order of last use is that in a sort by the token of last use, then by number.
    """
    n_tokens, ffn = active.shape
    n_warm_up = int(0.1 * n_tokens)
    times = torch.arange(n_tokens, dtype=torch.int16, device=active.device)[:, None]
    last_use = torch.where(active, times, -1).cummax(0).values.roll(1, 0)  # before each token
    last_use[0] = -1
    at_place = torch.zeros(ffn + 1, dtype=torch.int64, device=active.device)
    neurons = torch.arange(ffn, device=active.device)
    for uses, is_used in zip(last_use[n_warm_up:].split(512), active[n_warm_up:].split(512), strict=True):
        order = uses.sort(dim=1, descending=True, stable=True).indices
        place = torch.empty_like(order).scatter_(1, order, neurons.expand_as(order))
        place[uses < 0] = ffn
        at_place += torch.bincount(place[is_used], minlength=ffn + 1)
    counts = at_place.cpu().numpy()
    missed = counts.sum() - np.concatenate([[0], np.cumsum(counts[:-1])])
    return (missed[budgets.sizes(ffn, budgets.N_POINTS)] / max(1, n_tokens - n_warm_up)).tolist()
