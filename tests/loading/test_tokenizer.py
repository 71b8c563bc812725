"""Tokenizers: how many tokens a text has, what is cut, and what is damaged."""

import json

import numpy as np
import pytest

from alignprop_jax import errors
from alignprop_jax.errors import UserError
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.nn.clip import CLIPTextConfig

torch_pipeline = pytest.importorskip("tests.torch_pipeline")

VOCAB_SIZE, MAX_LENGTH = torch_pipeline.VOCAB_SIZE, torch_pipeline.MAX_LENGTH
ENCODER = CLIPTextConfig.from_dict(
    {"vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_LENGTH, "eos_token_id": 2}
)


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of vocab.json and merges.txt alone."""
    torch_pipeline.write_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def notes():
    """Notes are said once in a process: here, once in a test."""
    errors.note.cache_clear()


def test_tokens_are_padded_and_cut_to_the_encoders_length(tmp_path):
    torch_pipeline.write_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    ids = tokenize(tokenizer, ["a cat", "a hippopotamus on a tightrope"])
    start, end = VOCAB_SIZE - 2, VOCAB_SIZE - 1
    assert ids.dtype == np.int32 and ids.shape == (2, MAX_LENGTH)
    # One token a character: start, a, c, a, t, end and padding.
    assert ids[0, 0] == start and ids[1, 0] == start
    assert list(ids[0, 5:]) == [end] * 11 and end not in ids[0, :5]
    assert ids[1, -1] == end and end not in ids[1, :-1]


@pytest.mark.parametrize(
    ("config", "without_encoder", "with_encoder", "noted"),
    [
        (None, 77, MAX_LENGTH, False),
        ({}, 77, MAX_LENGTH, False),
        ({"model_max_length": None}, 77, MAX_LENGTH, False),
        ({"model_max_length": 1000000000000000019884624838656}, 77, MAX_LENGTH, False),
        ({"model_max_length": 1e30}, 77, MAX_LENGTH, False),
        ({"model_max_length": 8}, 8, 8, False),
        ({"model_max_length": 512}, 512, MAX_LENGTH, True),
    ],
)
def test_length(config, without_encoder, with_encoder, noted, folder, capsys):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for encoder, length in ((None, without_encoder), (ENCODER, with_encoder)):
        tokenizer = load_tokenizer(folder, encoder)
        assert tokenizer.model_max_length == length
        assert tokenize(tokenizer, ["a"]).shape == (1, length)
    assert (
        "has model_max_length=512, and the text encoder takes 16" in capsys.readouterr().out
    ) == (noted)


def test_what_is_cut_is_said_once(folder, capsys):
    tokenizer = load_tokenizer(folder, ENCODER)
    tokenize(tokenizer, ["a" * 14, "b" * 14])
    assert not capsys.readouterr().out
    prompts = ["c" * 14, *(f"{'very ' * 10}{name}" for name in "abcdef"), ""]
    first, *_ = (tokenize(tokenizer, prompts) for _ in range(2))
    assert first.shape == (len(prompts), MAX_LENGTH)
    assert capsys.readouterr().out.splitlines() == [
        "note: prompts are cut to the 16 tokens that the text encoder takes: "
        + ", ".join(["'very very very very very very very...' loses 27"] * 3)
        + ", and 3 more lose some"
    ]


def test_a_prompt_that_is_no_text(folder):
    with pytest.raises(UserError, match="the prompt .* holds bytes that are not UTF-8"):
        tokenize(load_tokenizer(folder), ["a cat", "a \udcff cat"])


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no CLIP tokenizer in"):
        load_tokenizer(tmp_path)


def test_tokens_that_the_encoder_does_not_know(folder):
    small = CLIPTextConfig.from_dict({"vocab_size": VOCAB_SIZE - 1})
    with pytest.raises(UserError, match=f"endoftext.* with id {VOCAB_SIZE - 1}, and the text enc"):
        load_tokenizer(folder, small)
    # A special token that the vocabulary lacks.
    vocabulary = json.loads((folder / "vocab.json").read_text())
    last = vocabulary.pop("<|startoftext|>")
    vocabulary["<|endoftext|>"] = last
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    encoder = CLIPTextConfig.from_dict({"vocab_size": len(vocabulary)})
    with pytest.raises(UserError, match="startoftext.* the vocabulary lacks the token"):
        load_tokenizer(folder, encoder)


BAD_JSON = ("", "{", "[]", "3", "null", '"text"', b"\xff\xfe", "[" * 5000)
DAMAGED = [
    *((name, data) for name in ("vocab.json", "tokenizer.json") for data in (*BAD_JSON, "{}")),
    *((f"{name}.json", bad) for name in ("tokenizer_config", "added_tokens") for bad in BAD_JSON),
    *(("special_tokens_map.json", data) for data in BAD_JSON),
    *(("vocab.json", json.dumps({"a": value})) for value in (-1, 1.5, None, "b", [], 10**12)),
    *(("merges.txt", data) for data in (b"\xff\xfe\0", "abc\n", "foo bar\n", "a b c\n", None)),
    *(
        ("tokenizer_config.json", json.dumps({"model_max_length": value}))
        for value in ("77", 0, 1, -5, [], {}, True)
    ),
    *(
        (name, json.dumps({token: value}))
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        for token in ("bos_token", "eos_token", "pad_token")
        # transformers takes an empty object in the second for the usual token.
        for value in (3, [], *([{}] if "config" in name else []))
    ),
    ("tokenizer_config.json", '{"bos_token": null}'),
    ("tokenizer_config.json", '{"pad_token": null}'),
    ("tokenizer_config.json", '{"padding_side": "middle"}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"a": 3}}'),
]


@pytest.mark.parametrize(("name", "data"), DAMAGED)
def test_damaged_files_are_one_line(name, data, folder):
    path = folder / name
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, ENCODER)
    message = str(caught.value)
    assert str(folder) in message and len(message) < 500 and "\n" not in message
