import json
from types import SimpleNamespace

import numpy as np
import pytest

from alignprop_jax.evaluation.diversity import mean_distances
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.trials import results


@pytest.mark.parametrize(
    "level, expected",
    [
        (0.5, 25.0),  # half way up the first stretch, of 50 queries
        (1.0, 50.0),
        (1.2, 130.0),  # the curve falls to 0.8 and passes 1.2 two thirds up to 1.4
        (1.5, None),
        (-1.0, 0.0),
    ],
)
def test_queries_to_a_level_lie_on_the_line_between_evaluations(level, expected):
    found = results.queries_to_reach(level, [0, 50, 90, 100, 145], [0.0, 1.0, 0.8, None, 1.4])
    assert found == pytest.approx(expected if level != 1.2 else 90 + 55 * 2 / 3)


def test_spread_over_seeds_is_the_sample_deviation():
    curves = [[1.0, 2.0, None], [3.0, 2.0, 1.0], [5.0, 2.0, 1.0]]
    spread = results.spread_over_seeds(curves)
    assert spread["mean"] == [3.0, 2.0, None]
    # Deviations -2, 0, 2: variance 8 / 2.
    assert spread["std"] == [2.0, 0.0, None]
    assert (spread["low"][0], spread["high"][0]) == (1.0, 5.0)
    assert results.spread_over_seeds([[1.0, 2.0]])["std"] == [0.0, 0.0]


def test_diversity_is_the_mean_of_all_pairs_of_a_prompt():
    rng = np.random.default_rng(0)
    embeddings, prompts = rng.standard_normal((9, 5)), np.array([0, 1, 2, 0, 1, 2, 0, 0, 3])
    distances = mean_distances(embeddings, prompts)

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    for prompt in range(4):
        rows = [i for i in range(9) if prompts[i] == prompt]
        pairs = [1 - cosine(embeddings[i], embeddings[j]) for i in rows for j in rows if i < j]
        if pairs:
            assert distances[rows].mean() == pytest.approx(np.mean(pairs), rel=1e-5)
        else:
            assert np.isnan(distances[rows]).all()


def test_samples_that_are_all_one_have_none():
    assert mean_distances(np.ones((3, 4)), np.zeros(3, int)) == pytest.approx(0, abs=1e-6)


def test_what_the_records_do_not_say_is_null_and_a_dash(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.metrics.append({"step": 1, "step_seconds": 0.5})
    for step in (0, 1):
        for split in ("train", "unseen"):
            workdir.evaluations.append({"step": step, "split": split, "n": 1, "glossy_mean": 0.5})
    unknown = dict.fromkeys(("seconds_per_step", "peak_rss_gb", "reward_before", "reward_after"))
    workdir.save_summary({"steps": 1, **unknown})
    run = SimpleNamespace(
        reward="redness",
        path=tmp_path,
        method=SimpleNamespace(name="ddpo"),
        config=SimpleNamespace(train=SimpleNamespace(num_steps=1)),
        queries_per_step=2,
        is_finished=lambda: True,
    )
    gathered = results.gather([run])
    json.dumps(gathered, allow_nan=False)
    assert gathered["rewards"]["redness"]["ddpo"]["peak_rss_gb"] is None
    row = results.table(gathered).splitlines()[-1]
    assert row == "| ddpo | - | - | nan | - | 0.50 ± 0.00 | - | - |"
