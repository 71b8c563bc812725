import numpy as np
import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize


def test_tokens_are_padded_and_cut_to_the_encoders_length(tmp_path):
    torch_pipeline = pytest.importorskip("tests.torch_pipeline")
    torch_pipeline.write_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    ids = tokenize(tokenizer, ["a cat", "a hippopotamus on a tightrope"])
    start, end = torch_pipeline.VOCAB_SIZE - 2, torch_pipeline.VOCAB_SIZE - 1
    assert ids.dtype == np.int32 and ids.shape == (2, torch_pipeline.MAX_LENGTH)
    # One token a character: start, a, c, a, t, end and padding.
    assert ids[0, 0] == start and ids[1, 0] == start
    assert list(ids[0, 5:]) == [end] * 11 and end not in ids[0, :5]
    assert ids[1, -1] == end and end not in ids[1, :-1]


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no CLIP tokenizer in"):
        load_tokenizer(tmp_path)
