"""A small CLIP tokenizer whose vocabulary holds each word of the captions as one token."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

MODEL_MAX_LENGTH = 16
START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
_END_OF_WORD = "</w>"


def build_tokenizer(words: Iterable[str], folder: str | Path) -> None:
    """Writes the files of a transformers `CLIPTokenizer`.

    Byte-pair encoding learnt on `words`, each once, until every one is a single token. Any other
    text falls back on parts of words and bytes, so nothing is unknown. The vocabulary has the order
    of CLIP's: 256 bytes, 256 bytes that end a word, the merges, start, end (which also pads).

    Args:
      words: of ASCII letters.
      folder: made when absent.
    """
    merges = _learn_merges(sorted({word.lower() for word in words}))
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START_TOKEN, END_TOKEN]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special_tokens = {
        "bos_token": START_TOKEN,
        "eos_token": END_TOKEN,
        "unk_token": END_TOKEN,
        "pad_token": END_TOKEN,
    }
    _write_json(folder / "special_tokens_map.json", special_tokens)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MODEL_MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    _write_json(folder / "tokenizer_config.json", settings | special_tokens)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges the most frequent neighbours, ties in alphabetical order, until none are left."""
    splits = [[*word[:-1], word[-1] + _END_OF_WORD] for word in words]
    merges = []
    while pairs := Counter(pair for parts in splits for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        splits = [_merge(parts, best) for parts in splits]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(parts):
        if tuple(parts[position : position + 2]) == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(parts[position])
            position += 1
    return merged


def _byte_symbols() -> list[str]:
    """The visible character that stands for each byte in byte-level BPE, in CLIP's order.

    Visible bytes of Latin-1 stand for themselves; the others take the code points from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    hidden = 256 - len(visible)
    return [chr(code) for code in [*visible, *range(256, 256 + hidden)]]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
