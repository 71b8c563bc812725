"""What judges say of a whole run."""

import pytest

from alignprop_jax.records.summary import judgements
from alignprop_jax.records.workdir import Workdir


def test_a_judge_may_have_no_opinion_on_a_split(tmp_path):
    """It is left out of the record there, or null; then the other split decides."""
    workdir = Workdir(tmp_path)
    for record in (
        {"step": 0, "split": "train", "n": 3, "reward_mean": 0.0, "glossy_mean": 0.5},
        {"step": 0, "split": "unseen", "n": 1, "reward_mean": 0.0, "counted_mean": 0.25},
        {"step": 4, "split": "train", "n": 3, "reward_mean": 1.0, "glossy_mean": 0.8},
        {"step": 4, "split": "unseen", "n": 1, "glossy_mean": 0.4, "counted_mean": None},
    ):
        workdir.evaluations.append(record)
    said = judgements(workdir, 4)
    assert said.keys() == {"glossy", "counted"}
    assert said["glossy"] == pytest.approx((0.5, (3 * 0.8 + 0.4) / 4))
    assert said["counted"] == pytest.approx((0.25, float("nan")), nan_ok=True)
