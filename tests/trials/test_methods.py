import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.trials.methods import ABLATIONS, DEFAULT_METHODS, Method


@pytest.mark.parametrize("text", [*DEFAULT_METHODS, *ABLATIONS])
def test_every_named_method_is_a_valid_config(text):
    Method.parse(text).config("configs/emoji.py:aesthetic", {})


def test_a_method_is_an_algorithm_and_its_settings():
    method = Method.parse("draft_lv gradient.renoise=3 train.learning_rate=1e-4")
    config = method.config("configs/emoji.py:aesthetic", {"train.seed": 5})
    assert config.algorithm == "draft_lv" and config.truncation.strategy == "last"
    assert (config.gradient.renoise, config.train.learning_rate) == (3, 1e-4)
    assert config.train.seed == 5
    assert method.folder == "draft_lv_gradient.renoise=3_train.learning_rate=1e-4"


def test_the_algorithm_of_the_file_stays_as_the_file_has_it():
    config = Method.parse("alignprop").config("configs/emoji.py:aesthetic", {})
    assert config.truncation.strategy == "full"


@pytest.mark.parametrize(
    "text, message",
    [
        ("alginprop", "'alginprop' is none of alignprop, draft, .*k1, k10"),
        ("ddpo learning_rate", "give settings as KEY=VALUE, not 'learning_rate'"),
        ("ddpo train.learning=1", "unknown config key config.train.learning"),
        ("ddpo train.learning_rate=fast", "method .*learning_rate"),
        ("draft_k truncation.k=99", "truncation.k is 99"),
        ("draft_k " + "a" * 300 + "=1", "too long for the name of its folder"),
    ],
)
def test_what_is_no_method_is_named(text, message):
    with pytest.raises(UserError, match=message):
        Method.parse(text).config("configs/emoji.py:aesthetic", {})
