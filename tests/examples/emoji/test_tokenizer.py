import json

import pytest
import transformers

from examples.emoji.captions import caption_words
from examples.emoji.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(caption_words(), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_every_caption_word_is_one_token(tokenizer):
    words = caption_words()
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert [len(token_ids) for token_ids in ids] == [1] * len(words)
    assert len({token_ids[0] for token_ids in ids}) == len(words)


def test_any_text_survives_the_round_trip(tokenizer):
    printable = "".join(map(chr, range(33, 127))).lower()
    ids = tokenizer(printable + " zebu", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == printable + "zebu"
    # Three bytes of UTF-8, by their standard byte-level symbols, the last of them ending the word.
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("猫", add_special_tokens=False).input_ids)
    assert tokens == ["ç", "Į", "«</w>"]


def test_text_is_padded_and_cut_to_sixteen_tokens(tokenizer):
    short, long = tokenizer(
        ["A  cat", "cat " * 30], padding="max_length", truncation=True
    ).input_ids
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    assert short == [start, vocabulary["a</w>"], vocabulary["cat</w>"]] + [end] * 13
    assert long == [start] + [vocabulary["cat</w>"]] * 14 + [end]
    # CLIP's text model finds the end of a prompt as the greatest id.
    assert end == max(vocabulary.values()) == len(vocabulary) - 1


def test_other_ways_of_loading_give_the_same_ids(folder, tokenizer):
    texts = ["three mice on a red background", "Zyzzyva, 42!", ""]
    for other in (transformers.CLIPTokenizerFast, transformers.AutoTokenizer):
        assert other.from_pretrained(folder)(texts).input_ids == tokenizer(texts).input_ids


def test_files_are_the_same_every_time(folder, tmp_path):
    build_tokenizer(reversed(caption_words()), tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
