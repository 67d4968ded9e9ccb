"""What is estimated from some of the skipped neurons: without bias, and with bars that say how far it may be off."""

import numpy as np
import pytest
import torch
from made_up import MadeUpLayer, MadeUpPredictor, MadeUpStep, made_up_step

from sparseflow.orchestration import live_recall
from sparseflow.orchestration.live_recall import LiveRecall, SparseStep, doubling_strata, sample_misses, stratified
from sparseflow.orchestration.recall_sums import RecallSums, StepSample

PATTERNS = {  # of misses
    "near": {"near": 0.3, "far": 0.0},
    "far": {"near": 0.0, "far": 0.02},
    "both": {"near": 0.2, "far": 0.005},
    "several tokens": {"near": 0.1, "far": 0.01, "n_tokens": 3},
    "one": {"near": 0.005, "far": 0.0005},
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def sampled(made: MadeUpStep, rng: np.random.Generator) -> StepSample:
    return sample_misses(made.source, made.predictor, made.step, rng)  # type: ignore[arg-type]


# --- strata


@pytest.mark.parametrize("n", [*range(30), 1000, 8192, 8193, 50000])
def test_strata_double_and_cover_all(n: int) -> None:
    strata = doubling_strata(n)
    assert [position for stratum in strata for position in stratum] == list(range(n))
    assert [len(stratum) for stratum in strata[:-1]] == [16 * 2**i for i in range(len(strata) - 1)]
    assert all(0 < len(stratum) <= 16 * 2**i for i, stratum in enumerate(strata))


def test_total_of_strata_is_as_in_the_book() -> None:
    total, variance = stratified([range(2), range(2, 12)], [np.array([1, 3]), np.array([1, 2, 3, 6])])
    assert total == 4 + 10 * 3
    assert variance == pytest.approx(0 + 10**2 * (1 - 4 / 10) * (14 / 3) / 4)


# --- one step


def is_unbiased(truth: float, estimates: list[float]) -> bool:
    """Whether the mean of many estimates is within 4 standard errors of the truth."""
    return bool(abs(np.mean(estimates) - truth) <= 4 * np.std(estimates, ddof=1) / len(estimates) ** 0.5 + 1e-9)


@each_pattern
def test_estimate_is_unbiased(rng: np.random.Generator, pattern: str) -> None:
    made = made_up_step(rng, **PATTERNS[pattern])  # type: ignore[arg-type]
    assert is_unbiased(made.n_missed, [sampled(made, rng).missed for _ in range(300)])


def test_estimate_without_weights_is_seen_to_be_biased(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unweighted(strata: list[range], drawn: list[np.ndarray]) -> tuple[float, float]:
        values = np.concatenate(drawn)
        return float(values.mean() * sum(map(len, strata))), 0.0

    monkeypatch.setattr(live_recall, "stratified", unweighted)
    made = made_up_step(rng, **PATTERNS["near"])
    assert not is_unbiased(made.n_missed, [sampled(made, rng).missed for _ in range(300)])


@pytest.mark.parametrize("pattern", ["near", "far", "several tokens"])
def test_variance_is_unbiased(rng: np.random.Generator, pattern: str) -> None:
    made = made_up_step(rng, **PATTERNS[pattern])  # type: ignore[arg-type]
    samples = [sampled(made, rng) for _ in range(800)]
    assert np.mean([s.variance for s in samples]) == pytest.approx(np.var([s.missed for s in samples]), rel=0.3)


def test_nearest_neurons_are_all_computed(rng: np.random.Generator) -> None:
    nearness = -rng.permutation(np.arange(1, 401)).astype(np.float32)[None]
    pre_activations = np.full((1, 400), -1, np.float32)
    pre_activations[0, np.argsort(-nearness[0])[:16]] = 1
    source, predictor = MadeUpLayer(pre_activations), MadeUpPredictor(nearness)
    step = SparseStep(0, source.x, np.empty(0, np.uint32), 0, torch.zeros(400))
    sample = sample_misses(source, predictor, step, rng)  # type: ignore[arg-type]
    assert (sample.missed, sample.variance) == (16, 0)
    assert (sample.n_skipped, sample.n_sampled) == (400, 5 * 16)


def test_neuron_is_as_near_as_for_the_token_that_is_nearest_to_it_and_unknown_is_nearest(
    rng: np.random.Generator,
) -> None:
    nearness = np.full((3, 200), -50, np.float32)
    nearness[1, 20:26] = -1
    nearness[2, 70:72] = np.nan
    pre_activations = np.full((3, 200), -1, np.float32)
    pre_activations[0, [*range(20, 26), 70, 71]] = 1
    source, predictor = MadeUpLayer(pre_activations), MadeUpPredictor(nearness)
    step = SparseStep(0, source.x, np.empty(0, np.uint32), 0, torch.zeros(200))
    sample = sample_misses(source, predictor, step, rng)  # type: ignore[arg-type]
    assert (sample.missed, sample.variance) == (8, 0)


@pytest.mark.parametrize("n_skipped", [0, 1, 16, 17])
def test_few_skipped_neurons_are_known_all_or_nearly(rng: np.random.Generator, n_skipped: int) -> None:
    source = MadeUpLayer(np.ones((1, 100), np.float32))
    predictor = MadeUpPredictor(np.full((1, 100), -1, np.float32))
    ids = np.sort(rng.permutation(100)[n_skipped:]).astype(np.uint32)
    step = SparseStep(0, source.x, ids, len(ids), torch.zeros(100))
    sample = sample_misses(source, predictor, step, rng)  # type: ignore[arg-type]
    assert sample == StepSample(n_skipped, 0.0, n_skipped, n_skipped)


def test_bias_counts_and_bundles_are_not_kept_and_fetched_in_parts(rng: np.random.Generator) -> None:
    source = MadeUpLayer(np.full((1, 100), -1, np.float32), fetch_limit=3)
    predictor = MadeUpPredictor(np.full((1, 100), -1, np.float32))
    step = SparseStep(0, source.x, np.empty(0, np.uint32), 0, torch.full((100,), 1.5))
    assert sample_misses(source, predictor, step, rng).missed == 100  # type: ignore[arg-type]
    assert len(source.kept) > 3
    assert not any(source.kept)


# --- many steps


def run(rng: np.random.Generator, steps: list[MadeUpStep], share: float) -> tuple[float, float]:
    """Estimate and error of one run, of which a share of the steps is sampled."""
    sums = RecallSums(steps=len(steps))
    for made in rng.choice(np.array(steps, object), max(1, int(share * len(steps))), replace=False):
        sums.add(made.step.n_active, sampled(made, rng))
    measured = sums.measured
    assert measured.recall is not None
    assert measured.recall_error is not None
    return measured.recall, measured.recall_error


@pytest.mark.parametrize(("pattern", "share"), [("near", 0.2), ("far", 1.0), ("both", 0.2), ("both", 1.0)])
def test_bars_cover_the_truth_about_as_often_as_they_say(rng: np.random.Generator, pattern: str, share: float) -> None:
    """Layers differ: some miss more than others, as a model's do."""
    kinds = [{name: value * n / 2 for name, value in PATTERNS[pattern].items()} for n in range(4)]
    steps = [made_up_step(rng, **kinds[n % 4], ffn_dim=600) for n in range(int(40 / share))]  # type: ignore[arg-type]
    found, missed = sum(made.step.n_active for made in steps), sum(made.n_missed for made in steps)
    truth = found / (found + missed)
    off = np.array([(recall - truth) / error for recall, error in (run(rng, steps, share) for _ in range(60))])
    assert (abs(off) <= 1).mean() > 0.4  # 0.68
    assert (abs(off) <= 2).mean() > 0.75  # 0.95
    assert (abs(off) <= 3).mean() > 0.85  # 0.997; misses that are rare and far make a skewed distribution
    assert np.sqrt(np.mean(off**2)) > 0.5, "bars are too long"


@pytest.mark.parametrize("n_steps", [1, 5, 50])
def test_where_no_miss_was_seen_the_bar_is_what_one_would_have_cost(rng: np.random.Generator, n_steps: int) -> None:
    steps = [made_up_step(rng, near=0, far=0) for _ in range(n_steps)]
    recall, error = run(rng, steps, 1.0)
    skipped = steps[0].source.profile.ffn_dimension - np.mean([len(made.step.ids) for made in steps])
    n_sampled = sampled(steps[0], rng).n_sampled
    assert recall == 1
    assert error == pytest.approx(skipped / n_sampled / sum(made.step.n_active for made in steps), rel=0.02)


def test_misses_too_rare_to_be_seen_are_within_the_bar(rng: np.random.Generator) -> None:
    """One neuron in 2000 skipped is missed, and some 60 are looked at each time: mostly none is seen."""
    n_covered = n_none_seen = 0
    for _ in range(60):
        steps = [made_up_step(rng, near=0, far=0.0005, ffn_dim=600) for _ in range(10)]
        found, missed = sum(made.step.n_active for made in steps), sum(made.n_missed for made in steps)
        recall, error = run(rng, steps, 1.0)
        n_none_seen += recall == 1
        n_covered += abs(recall - found / (found + missed)) <= 2 * error
    assert n_none_seen > 5
    assert n_covered > 45


def test_steps_that_were_not_sampled_make_the_bar_longer(rng: np.random.Generator) -> None:
    sums = RecallSums(steps=30)
    for n in range(30):
        made = made_up_step(rng, near=0.3 * (n % 3), far=0, ffn_dim=600)
        sums.add(made.step.n_active, sampled(made, rng))
    all_of_them = sums.measured.recall_error
    sums.steps = 3000
    few_of_them = sums.measured.recall_error
    assert all_of_them is not None
    assert few_of_them is not None
    assert few_of_them > 1.2 * all_of_them


# --- when


def test_oracle_is_not_sampled(rng: np.random.Generator) -> None:
    made = made_up_step(rng, near=0.3, far=0)
    made.predictor.fidelity = "oracle"
    live, sums = LiveRecall(made.source), RecallSums()  # type: ignore[arg-type]
    live.every_step = True
    assert not live.step(made.predictor, made.step, sums)
    assert sums == RecallSums()


def test_torch_draws_the_same_with_and_without(rng: np.random.Generator) -> None:
    made = made_up_step(rng, near=0.3, far=0)
    torch.manual_seed(3)
    first = torch.rand(4)
    torch.manual_seed(3)
    sampled(made, rng)
    assert torch.equal(torch.rand(4), first)


# --- token by token, on a device


def test_what_passes_between_texts_is_no_tokens_time() -> None:
    """Else samples would come too often, and at the beginning of texts."""
    now_s = 0.0
    made = made_up_step(np.random.default_rng(0), near=0.1, far=0.0)
    live = LiveRecall(made.source, clock=lambda: now_s)  # type: ignore[arg-type]
    sums = RecallSums()
    intervals = []
    for pause_s in (0.0, 1000.0):
        for _ in range(20):
            live.pause()
            now_s += pause_s
            for _ in range(10):
                now_s += 0.01
                live.token(made.predictor, 1, lambda _: made.step, sums)  # type: ignore[arg-type]
        intervals.append(live.pace._step_s)
    assert intervals == pytest.approx([0.01, 0.01])
    assert sums.steps == 400


def test_a_layer_is_drawn_for_each_sample() -> None:
    made = made_up_step(np.random.default_rng(0), near=0.1, far=0.0)
    live, sums, asked = LiveRecall(made.source), RecallSums(), []  # type: ignore[arg-type]

    class Always:
        def is_due(self, layer: int) -> bool:
            return True

        def sampled(self) -> None:
            """At once again."""

    live.pace = Always()  # type: ignore[assignment]

    def taken(layer: int) -> SparseStep:
        asked.append(layer)
        return made.step

    for _ in range(200):
        live.token(made.predictor, 4, taken, sums)  # type: ignore[arg-type]
    assert sums.sampled_steps == 200
    assert sums.steps == 800
    assert all(30 <= asked.count(layer) <= 70 for layer in range(4))
