"""How valid input is damaged: every function here draws from a `random.Random`.

So the same strategies serve hypothesis, which draws for it and shrinks what it drew, a campaign of
many seeds, and a fuzzer that is guided by coverage and draws from its bytes.
"""

import copy
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """An input, and in words how it departs from a valid one."""

    story: str
    value: Any


# Written into JSON as text: Python would refuse to write some of them.
_MARKS = {
    "@deep@": "[" * 20_000 + "]" * 20_000,
    "@deep object@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@digits@": "9" * 5_000,
    "@float@": "1e999",
    "@long@": json.dumps("x" * 200_000),
}
_NUMBERS = (0, 1, 2, 3, -1, 7, 16, 1000, 0.5, 1.0, -0.0, 1e-300, 1e308, math.nan, math.inf)
_NUMBERS += (-math.inf, 2**31, 2**63, -(2**63) - 1, 10**9, 10**30, 10**400)
_STRINGS = ("", " ", "a", "0", "1", "nan", "null", "é", "\u2028", "\0", "\ud800", "\x1b[31m")
_STRINGS += ("../a", "x" * 3000, "a\nb", "/etc/hostname", *_MARKS)
_OTHERS = ([], {}, [None], [[]], [0], [1, 2, 3], ["a"], [1e400], [0.5] * 1000, {"a": 1})
_OTHERS += ({"": None}, {"height": 8, "width": 8}, [[[[[[[[1]]]]]]]])
ODD_VALUES = (None, True, False, *_NUMBERS, *_STRINGS, *_OTHERS)
ODD_TEXTS = ("", " ", "\n", "\r\n", "\t", "\0", "\ufeff", "\u2028", "\x0c", "\x85", "\x1b[31m")
ODD_TEXTS += ("\ud800", "é", "日本", "🦆", "\u200b", "\u202e", "</script>", "<!--", "&amp;")
ODD_TEXTS += tuple("<>'\"\\`:=./~-,@#") + ("%s", "{0}", "$(x)", "..", "~nobody", "--", "None")
ODD_DIGITS = ("0", "-1", "1e400", "nan", "inf", "٣", "²", "1_0", "0x10", "9" * 30, "9" * 5000)
ODD_TEXTS += (*ODD_DIGITS, "x" * 3000, "True", "[]", "{}", "(", "[" * 300, "(" * 10_000)
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "latin-1")


def odd_value(random: Random) -> Any:
    return copy.deepcopy(random.choice(ODD_VALUES))


def mutate_value(random: Random, document: Any, times: int = 0) -> Case:
    """A JSON value with one to three changes; the story says which."""
    document = copy.deepcopy(document)
    stories = []
    for _ in range(times or random.choice((1, 1, 1, 2, 3))):
        places = list(_places(document, ()))
        if not places or random.random() < 0.02:
            document = odd_value(random)
            stories.append(f"all is {_shown(document)}")
            continue
        parent, key, path = random.choice(places)
        stories.append(_change(random, parent, key, path))
    return Case("; ".join(stories), document)


def _change(random: Random, parent: Any, key: Any, path: str) -> str:
    old = parent[key]
    what = random.choice(("replace", "replace", "replace", "delete", "nudge", "key", "extra"))
    if what == "delete":
        del parent[key]
        return f"{path} deleted"
    if what == "nudge":
        new = _nudged(random, old)
    elif what == "key" and isinstance(parent, dict):
        new_key = random.choice((*ODD_TEXTS[:40], str(key).upper(), f"{key}.", str(key)[1:]))
        parent[new_key] = parent.pop(key)
        return f"{path} renamed {new_key[:40]!r}"
    elif what == "extra":
        new = odd_value(random)
        if isinstance(parent, dict):
            name = random.choice(("extra", "", "_name_or_path", "__class__", "x" * 300))
            parent[name] = new
            return f"{name[:20]!r} added beside {path}: {_shown(new)}"
        parent.insert(key, new)
        return f"{_shown(new)} inserted at {path}"
    else:
        new = odd_value(random)
    parent[key] = new
    return f"{path} = {_shown(new)}"


def _nudged(random: Random, old: Any) -> Any:
    """Of the same type, mostly: the values that look right."""
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int | float):
        as_float = float(old) if abs(old) < 1e300 else 0.5
        return random.choice((old + 1, old - 1, -old, old * 10, old * 1000, str(old), as_float))
    if isinstance(old, str):
        return mutate_text(random, old).value
    if isinstance(old, list):
        return random.choice((old[:-1], old + old, old[::-1], old * 300, dict(enumerate(old))))
    return [list(item) for item in old.items()]


def _places(document: Any, path: tuple) -> Any:
    items = document.items() if isinstance(document, dict) else ()
    items = enumerate(document) if isinstance(document, list) else items
    for key, value in list(items)[:300]:
        yield document, key, ".".join(map(str, (*path, key)))
        yield from _places(value, (*path, key))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def to_json(value: Any) -> str:
    text = json.dumps(value)
    for mark, stand_in in _MARKS.items():
        text = text.replace(json.dumps(mark), stand_in)
    return text


def mutate_json(random: Random, document: Any) -> Case:
    """The bytes of a JSON file: its values changed, or its text, or its encoding."""
    what = random.random()
    if what < 0.8:
        story, value = mutate_value(random, document)
        return Case(story, to_json(value).encode("utf-8", "surrogatepass"))
    text = json.dumps(document)
    if what < 0.85:
        first = next(iter(document), "a") if isinstance(document, dict) else "a"
        odd = odd_value(random)
        twice = f"{{{json.dumps(first)}: {to_json(odd)}, {text.lstrip('{[')}"
        return Case(f"{first} twice, first {_shown(odd)}", twice.encode("utf-8", "surrogatepass"))
    if what < 0.9:
        encoding = random.choice(_ENCODINGS)
        return Case(f"in {encoding}", text.encode(encoding))
    return mutate_bytes(random, text.encode())


def mutate_text(random: Random, text: str) -> Case:
    """Text with something put in, cut out, repeated or exchanged."""
    start = random.randint(0, len(text))
    end = min(len(text), start + random.choice((0, 0, 1, 1, 2, 5, 1000)))
    odd = random.choice((*ODD_TEXTS, text[start:end] * 2, text, text[::-1], text.upper()))
    return Case(f"{start}:{end} = {_shown(odd)}", text[:start] + odd + text[end:])


def mutate_bytes(random: Random, data: bytes) -> Case:
    """Bytes cut, flipped, overwritten, put in, doubled or exchanged."""
    start = random.randint(0, len(data))
    end = min(len(data), start + random.choice((1, 1, 2, 4, 8, 64, 4096)))
    what = random.choice(("cut", "flip", "flip", "write", "number", "insert", "delete", "double"))
    if what == "cut":
        return Case(f"cut at {start}", data[:start])
    if what == "flip":
        position, bit = min(start, max(len(data) - 1, 0)), random.randint(0, 7)
        flipped = bytes(byte ^ (1 << bit) for byte in data[position : position + 1])
        story = f"bit {bit} of byte {position}"
        return Case(story, data[:position] + flipped + data[position + 1 :])
    new = {
        "write": random.choice((b"\0", b"\xff", b"\x80", b" ")) * (end - start),
        "number": struct.pack("<Q", random.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))),
        "insert": random.choice((b"\0", b"\xef\xbb\xbf", b"\n", b"{", b"\xff\xfe", b"0" * 5000)),
        "delete": b"",
        "double": data[start:end] * 2,
    }[what]
    end = {"insert": start, "number": min(len(data), start + 8)}.get(what, end)
    return Case(f"{what} {start}:{end}", data[:start] + new + data[end:])


def numbers(random: Random) -> str:
    """What somebody may write for a number."""
    usual = ("1", "2", "1000", "0.5", "-0", "007", "+1", " 1", "1.0", "", "a", "None", "[]")
    if random.random() < 0.3:
        return str(random.randint(-(2**70), 2**70))
    return random.choice((*ODD_DIGITS, *usual))


_DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "uint8": "U8", "int64": "I64"}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


def safetensors_header(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], bytes]:
    """The header of a file, as an object, and the bytes behind it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), end],
        }
        data += tensor.tobytes()
    return header, data


def write_safetensors(header: str, data: bytes) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data


def read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    """What the file says, by the format's description: an independent reading, for the oracle."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
    kinds |= {"I8": "i1", "U8": "u1", "BOOL": "?", "U16": "<u2", "U32": "<u4", "U64": "<u8"}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        raw = data[start:end]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
            tensors[name] = wide.view(np.float32).reshape(entry["shape"])
        else:
            tensors[name] = np.frombuffer(raw, kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def mutate_safetensors(
    random: Random, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> Case:
    """A safetensors file whose tensors, names, header or bytes were changed."""
    tensors, metadata = dict(tensors), metadata or {}
    what = random.choice(("tensor", "tensor", "name", "header", "metadata", "bytes"))
    story = ""
    if what == "tensor" and tensors:
        name = random.choice(sorted(tensors))
        story, tensors[name] = _mutate_tensor(random, tensors[name])
        story = f"{name} {story}"
    elif what == "name" and tensors:
        name = random.choice(sorted(tensors))
        story, other = mutate_text(random, name)
        story = f"{name} renamed: {story}"
        tensor = tensors.pop(name)
        if random.random() < 0.8:
            tensors[other] = tensor
    header, data = safetensors_header(tensors, metadata)
    if what == "header":
        story, header = mutate_value(random, header)
        story = f"header: {story}"
    elif what == "metadata":
        story, value = mutate_value(random, {"__metadata__": dict(metadata)})
        story, header = f"header: {story}", {**header, **(value if type(value) is dict else {})}
    content = write_safetensors(to_json(header), data)
    if what == "bytes":
        # Most of a file is data; most of what can be wrong is not.
        size = struct.unpack("<Q", content[:8])[0] + 64
        if random.random() < 0.7:
            story, front = mutate_bytes(random, content[:size])
            content = front + content[size:]
        else:
            story, content = mutate_bytes(random, content)
    return Case(story, content)


def _mutate_tensor(random: Random, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    what = random.choice(("odd", "odd", "shape", "dtype", "empty", "scalar", "rank"))
    if what == "odd":
        tensor = tensor.copy()
        value = random.choice((math.nan, math.inf, -math.inf, 0.0, 3e38, 1e-45))
        if tensor.size and tensor.dtype.kind == "f":
            tensor.flat[random.randint(0, tensor.size - 1)] = np.float32(value)
        return f"holds {value}", tensor
    if what == "shape":
        return "flattened", tensor.reshape(-1)
    if what == "dtype":
        dtype = random.choice(sorted(_DTYPES))
        return f"as {dtype}", np.nan_to_num(tensor).clip(0, 200).astype(dtype)
    if what == "empty":
        return "empty", tensor[:0] if tensor.ndim else tensor.reshape(1)[:0]
    if what == "scalar":
        return "a number", tensor.reshape(-1)[:1].reshape(())
    return "one axis more", tensor[..., None, None]


def files(
    mutate: Callable[..., Case], contents: Mapping[str, Any], names: Sequence[str] = ()
) -> Callable[[Random], Case]:
    """One of several files changed by `mutate`, emptied, or taken away; the value is by name."""
    names = tuple(names or contents)

    def draw(random: Random) -> Case:
        name = random.choice(names)
        if random.random() < 0.02:
            return Case(f"{name} empty", {name: b""})
        if random.random() < 0.02:
            return Case(f"{name} missing", {name: None})
        story, value = mutate(random, contents[name])
        return Case(f"{name}: {story}", {name: value})

    return draw
