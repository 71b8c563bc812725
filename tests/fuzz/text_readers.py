"""Readers of what is typed: prompts, flags, configs, names, settings."""

import ast
import contextlib
import io
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

from alignprop_jax import errors, sample
from alignprop_jax.config import (
    default_config,
    define_config_flag,
    gradient_path,
    load_config,
    to_json,
    validate,
)
from alignprop_jax.devices import distributed
from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import open_model
from alignprop_jax.loading.hub import HubName
from alignprop_jax.lora.mixing import define_lora_flags, parse_timesteps
from alignprop_jax.pages import comparison as comparison_page
from alignprop_jax.pages import sweep as sweep_page
from alignprop_jax.pages.sweep import lora_name
from alignprop_jax.planning.topology import Topology
from alignprop_jax.prompts.objects import prompt_objects
from alignprop_jax.prompts.reading import load_prompts
from alignprop_jax.records.places import name_of
from alignprop_jax.rewards import count, remove
from alignprop_jax.rewards.user import load_user_reward
from alignprop_jax.runs.recipes import REWARDS, SETTINGS, full_size_config
from alignprop_jax.runs.settings import adaptation_of
from alignprop_jax.trials.methods import ABLATIONS, Method
from tests.fuzz.reader import Files, Reader, reader, same
from tests.fuzz.strategies import (
    ODD_TEXTS,
    Case,
    mutate_bytes,
    mutate_text,
    numbers,
)

# Values as somebody may write them in Python, and lines of a file that do not do what they should.
_SOURCES = r"""None | True | 0 | -1 | 3 | 0.5 | 1e400 | -1e400 | float('nan') | 10**400 | 2**31
| 2**63 | 2**64 | '' | 'a' | '\0' | 'x' * 3000 | 'a\nb' | '\ud800' | b'a' | [] | () | {} | ['to_q']
| ('to_q', 3) | {'aesthetic': 1.0} | {'aesthetic': float('nan')} | {'aesthetic': 'a'} | {1: 1.0}
| object() | lambda: 0 | config | __import__('numpy').float32(3) | __import__('numpy').int64(3)
| __import__('numpy').ones(3) | set() | 3 + 4j | range(3)"""
_SOURCES = tuple(source.strip() for source in _SOURCES.split("|"))
_STATEMENTS = r"""raise SystemExit | import sys; sys.exit(3) | 1 / 0 | raise Exception('x' * 99_999)
| raise Exception('a\nb') | raise UserError('config: a\nb') | ( | import no_such_module | return
| raise RecursionError | raise MemoryError | del config.train | config = None | config = 3
| config = {} | config.extra = 1 | config.train = 3 | config.train.extra = {} | config.lora = None
| raise Exception('\x1b[31m\0') | raise OSError(2, 'no', 'a' * 5000) | assert False"""
_STATEMENTS = (*(line.strip() for line in _STATEMENTS.split("|")), "\0", "'\ud800'")
_CONFIG = """from alignprop_jax.config import default_config, UserError

def get_config(variant=None):
    config = default_config()
    {statement}
    return config
"""


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if hasattr(value, "items") and key != "reward":
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


_LEAVES = sorted(leaves(default_config()))


def check_config(config: Any) -> None:
    """Accepted by `validate`, so every number can be used, and the record is JSON."""
    for key, value in leaves(config).items():
        if isinstance(value, float | int):
            assert math.isfinite(value) and abs(value) < 2**63, f"{key} is {value}"
    strict = json.loads(to_json(config), parse_constant=_refuse)
    same(set(leaves(strict)), set(_LEAVES), "keys of config.json")
    assert math.isfinite(getattr(adaptation_of(config), "scale", 1.0))
    gradient_path(config)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@reader()
def config_file(folder: Path) -> Reader:
    def draw(random: Random) -> Case:
        what = random.random()
        if what < 0.6:
            key, source = random.choice(_LEAVES), random.choice(_SOURCES)
            statement = f"with config.ignore_type(): config.{key} = {source}"
            story = f"{key} = {source}"
        elif what < 0.9:
            story = statement = random.choice(_STATEMENTS)
        else:
            text = _CONFIG.format(statement="pass").encode()
            story, content = mutate_bytes(random, text)
            return Case(story, {"config.py": content})
        content = _CONFIG.format(statement=statement).encode("utf-8", "surrogatepass")
        return Case(story, {"config.py": content})

    contents = Files(folder, {"config.py": _CONFIG.format(statement="pass").encode()})

    def read(folder: Path) -> Any:
        with mock.patch.object(sys, "dont_write_bytecode", True):
            config = load_config(str(folder / "config.py"))
        validate(config)
        return config

    # A value that is not allowed is the key's fault, whatever file it stands in.
    return contents.reader(
        draw, read, lambda _, config: check_config(config), ["config", "truncation.", "gradient."]
    )


@reader(0.5)
def flag(folder: Path) -> Reader:
    (folder / "config.py").write_text(_CONFIG.format(statement="pass"))
    (folder / "flags").write_text("--mix=0.5\n")

    def value(random: Random) -> str:
        return random.choice(
            (numbers(random), random.choice(_SOURCES), random.choice(ODD_TEXTS), "1", "0.5")
        )

    def draw(random: Random) -> Case:
        arguments = []
        for _ in range(random.choice((1, 1, 2))):
            key = random.choice(_LEAVES)
            name = random.choice(
                (f"config.{key}", f"config.{key}", f"config.{key}", f"noconfig.{key}", "config")
                + ("lora", "mix", "lora_timesteps", "flagfile", "undefok", "config.train", "seed")
            )
            if random.random() < 0.1:
                name = mutate_text(random, name).value
            argument = random.choice((f"--{name}={value(random)}",) * 6 + (f"--{name}", f"-{name}"))
            arguments.append(argument)
        return Case(" ".join(map(repr, arguments))[:200], arguments)

    def read(arguments: list[str]) -> Any:
        argv = ["program", f"--config={folder / 'config.py'}", *arguments]
        before = set(flags.FLAGS)
        stderr = io.StringIO()
        try:
            config, lora = define_config_flag(), define_lora_flags()
            with contextlib.redirect_stderr(stderr), mock.patch.object(sys, "argv", argv):
                errors._parse_flags(argv)
            validate(config.value)
            return config.value, lora()
        except SystemExit as error:
            lines = stderr.getvalue().splitlines()
            if error.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
                raise
            raise UserError(lines[0]) from error
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()

    def check(arguments: list[str], result: Any) -> None:
        config, lora = result
        check_config(config)
        assert lora.mix is None or 0 <= lora.mix <= 1

    return Reader(draw, read, [], check)


@reader()
def prompt_file(folder: Path) -> Reader:
    valid = "a cat\na dog\n\n  two foxes, and a bee \r\nein Käfer\n"

    def draw(random: Random) -> Case:
        if random.random() < 0.6:
            story, text = mutate_text(random, valid)
            encoding = random.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"))
            content = text.encode(encoding, "surrogatepass")
            return Case(f"{story} in {encoding}", {"prompts.txt": content})
        story, content = mutate_bytes(random, valid.encode())
        return Case(story, {"prompts.txt": content})

    def check(value: dict[str, bytes], prompts: list[str]) -> None:
        text = value["prompts.txt"].decode("utf-8-sig")
        lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
        # Files that were put behind one another have the mark of the second within.
        lines = [line.strip("\ufeff").strip() for line in lines]
        given = [prompt.strip("\ufeff").strip() for prompt in prompts]
        same(given, [line for line in lines if line], "the list of prompts")

    contents = Files(folder, {"prompts.txt": valid.encode()})
    return contents.reader(draw, lambda f: load_prompts(str(f / "prompts.txt")), check)


def _text_reader(valid, read, check=lambda text, result: None, culprits=lambda text: ()):
    """A reader of a text, which is one of some valid ones that was damaged."""

    def draw(random: Random) -> Case:
        text = random.choice(valid)
        if random.random() < 0.05:
            return Case("valid", text)
        story, text = mutate_text(random, text)
        if random.random() < 0.2:
            story, text = mutate_text(random, text)
        return Case(repr(text)[:120], text)

    return Reader(draw, read, valid[0], check, culprits)


@reader()
def topology(folder: Path) -> Reader:
    def check(text: str, parsed: Topology) -> None:
        same(Topology.parse(str(parsed)), parsed, "the slice by its own name")
        assert all(1 <= edge < 10**5 for edge in parsed.shape), str(parsed)
        assert text.isascii()
        for number in re.findall(r"\d+", text.partition(":")[2]):
            assert int(number) in parsed.shape

    valid = ("v5e:4x4", "v4:2x2x1", "v5litepod-16", "v4-8", "v5p-128", "v6e:2x2", "v5lite-4")
    return _text_reader(valid, Topology.parse, check, lambda text: ["topology"])


@reader()
def lora_timesteps(folder: Path) -> Reader:
    def check(text: str, span: tuple[int, int]) -> None:
        assert text.isascii() and span[0] >= span[1] >= 0, repr(text)
        same(span, tuple(map(int, text.split(":"))), "the range")
        np.int32(span[0])

    valid = ("1000:600", "1000:0", "0:0", "500:250")
    return _text_reader(valid, parse_timesteps, check, lambda text: ["lora_timesteps"])


@reader()
def hub_name(folder: Path) -> Reader:
    def read(text: str) -> Any:
        name = HubName.parse(text)
        if name is not None:
            return name
        source = open_model(text)
        # Whatever is no name of the hub is a path; nothing is read of it before it is asked for.
        return str(source)

    def check(text: str, name: Any) -> None:
        if isinstance(name, HubName):
            same(str(name), text, "the name")
            assert text.isprintable(), repr(text)
        else:
            path = os.path.expanduser(text)
            folders = (path, path.rpartition(":")[0])
            assert text == "emoji" or any(map(os.path.isdir, folders)), f"opened {name}"

    valid = (
        "owner/name",
        "owner/name@main",
        "a/b:fp16",
        "a/b@v1.0/file.safetensors",
        "/tmp/no",
        "~/x",
    )
    return _text_reader(valid, read, check)


class _Detector:
    """Stands for a detector: the texts alone matter here."""

    def embed(self, names: list[str]) -> np.ndarray:
        assert all(isinstance(name, str) and name for name in names)
        return np.zeros((len(names), 4), np.float32)


@reader()
def prompt_objects_and_counts(folder: Path) -> Reader:
    def read(prompt: str) -> Any:
        objects = prompt_objects(prompt)
        return (
            objects,
            count._prepare(_Detector(), [prompt], 0),
            remove._prepare(_Detector(), [prompt], "dog"),
        )

    def check(prompt: str, result: Any) -> None:
        objects, counts, removed = result
        for thing in objects:
            assert thing.name and thing.name == thing.name.strip()
            assert thing.number is None or 0 <= thing.number <= 10**6, f"{thing.number} objects"
        assert ((0 <= counts["numbers"]) & (counts["numbers"] <= 64)).all()
        assert np.isfinite(removed["weights"]).all()

    valid = (
        "three dogs and a red cat on a blue background",
        "12 birds, the fox & some rice",
        "a cow",
    )
    return _text_reader(valid, read, check)


@reader(0.5)
def method(folder: Path) -> Reader:
    (folder / "config.py").write_text(_CONFIG.format(statement="pass"))

    def draw(random: Random) -> Case:
        if random.random() < 0.3:
            text = mutate_text(random, random.choice(("ddpo sampler.eta=1.0", *ABLATIONS))).value
        else:
            value = random.choice((numbers(random), random.choice(_SOURCES).replace(" ", "")))
            text = (
                f"{random.choice(('alignprop', 'draft', 'rwr'))} {random.choice(_LEAVES)}={value}"
            )
        return Case(repr(text)[:120], text)

    def read(text: str) -> Any:
        parsed = Method.parse(text)
        return parsed, parsed.config(f"{folder / 'config.py'}", {})

    def check(text: str, result: Any) -> None:
        parsed, config = result
        check_config(config)
        assert 0 < len(parsed.folder.encode()) <= 255, "no name of a folder"
        for key, value in parsed.settings:
            given = leaves(config)[key]
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            if key != "reward":
                assert given == value, f"{key} is {given!r}, not {value!r}"

    culprits = ["method", "config.", "truncation.", "gradient."]
    return Reader(draw, read, "ddpo sampler.eta=1.0", check, lambda text: culprits)


@reader(0.5)
def recipe(folder: Path) -> Reader:
    def read(text: str) -> Any:
        config = full_size_config("model", text)
        validate(config)
        return config

    valid = [f"{reward}_{setting}" for reward in REWARDS for setting in SETTINGS] + list(REWARDS)
    return _text_reader(valid, read, lambda _, config: check_config(config))


@reader()
def environment(folder: Path) -> Reader:
    """Of several processes; what JAX would be told is caught."""
    names = (distributed.ADDRESS, distributed.COUNT, distributed.ID)
    valid = ("localhost:1234", "2", "1")

    def draw(random: Random) -> Case:
        values = dict(zip(names, valid, strict=True))
        name = random.choice(names)
        if random.random() < 0.2:
            del values[name]
        else:
            text = mutate_text(random, values[name]).value
            # An environment holds neither.
            text = random.choice((text, numbers(random))).replace("\0", "").replace("\ud800", "")
            values[name] = text
        return Case(str(values)[:200], values)

    def read(values: dict[str, str]) -> Any:
        with (
            mock.patch.dict(os.environ, values),
            mock.patch.object(jax.distributed, "initialize") as call,
        ):
            distributed.initialize()
        return call.call_args.kwargs if call.called else None

    def check(values: dict[str, str], told: Any) -> None:
        if told is None:
            assert not any(values.values())
            return
        assert 0 <= told["process_id"] < told["num_processes"] < 2**31, str(told)
        host, _, port = values[distributed.ADDRESS].rpartition(":")
        assert host and 0 < int(port) < 2**16 and not re.search(r"\s", host), "no HOST:PORT"

    return Reader(draw, read, dict(zip(names, valid, strict=True)), check, lambda values: names)


@reader()
def latents(folder: Path) -> Reader:
    noise = np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)

    def encode(array: np.ndarray, save=np.save) -> bytes:
        buffer = io.BytesIO()
        save(buffer, array)
        return buffer.getvalue()

    others = {
        "float64": encode(noise.astype(np.float64)),
        "float16": encode(noise.astype(np.float16)),
        "integers": encode((noise * 9).astype(np.int8)),
        "complex": encode(noise.astype(np.complex64)),
        "strings": encode(noise.astype(str)),
        "columns first": encode(np.asfortranarray(noise)),
        "big endian": encode(noise.astype(">f4")),
        "NaN": encode(np.where(noise > 1, np.nan, noise)),
        "infinite": encode(np.where(noise > 1, np.inf, noise)),
        "beyond float32": encode(noise.astype(np.float64) * 1e300),
        "dates": encode(np.zeros(noise.shape, "M8[s]")),
        "records": encode(np.zeros(noise.shape, [("a", "f4")])),
        "booleans": encode(noise > 0),
        "objects": encode(noise.astype(object)),
        "an archive": encode(noise, np.savez),
        "another shape": encode(noise[:1]),
        "vast": encode(noise).replace(b"(2, 4, 3, 3)", b"(2, 4, 3, 3000000000)", 1),
        "a pickle": b"\x80\x04N.",
        "more behind": encode(noise) * 2,
    }

    def draw(random: Random) -> Case:
        name = random.choice(list(others))
        if random.random() < 0.2:
            return Case(name, {"latents.npy": others[name]})
        story, content = mutate_bytes(random, encode(noise))
        return Case(story, {"latents.npy": content})

    def check(value: dict[str, bytes], read: Any) -> None:
        expected = np.load(io.BytesIO(value["latents.npy"]), allow_pickle=False)
        assert np.isfinite(read).all()
        assert expected.dtype.kind == "f", f"of type {expected.dtype}"
        np.testing.assert_array_equal(np.asarray(read), expected.transpose(0, 2, 3, 1))

    contents = Files(folder, {"latents.npy": encode(noise)})
    return contents.reader(
        draw, lambda f: sample.read_latents(f / "latents.npy", 2, (3, 3, 4)), check
    )


@reader(0.5)
def reward_file(folder: Path) -> Reader:
    template = "def reward(images, prompts):\n    return images.mean((1, 2, 3))\n{statement}\n"

    def draw(random: Random) -> Case:
        if random.random() < 0.7:
            story = random.choice((*_STATEMENTS, *(f"reward = {x}" for x in _SOURCES)))
            content = template.format(statement=story).encode("utf-8", "surrogatepass")
        else:
            story, content = mutate_bytes(random, template.format(statement="").encode())
        return Case(story, {"reward.py": content})

    def read(folder: Path) -> Any:
        with mock.patch.object(sys, "dont_write_bytecode", True):
            return load_user_reward(f"{folder / 'reward.py'}:reward", None)

    contents = Files(folder, {"reward.py": template.format(statement="").encode()})
    return contents.reader(draw, read, lambda _, found: same(found.name, "reward", "the name"))


class _Page(HTMLParser):
    """The elements of a page, and the data in it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple] = []
        self.data, self._within = "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, tuple(attributes)))
        self._within = ("id", "data") in attributes

    def handle_endtag(self, tag: str) -> None:
        self._within = False

    def handle_data(self, text: str) -> None:
        self.data += text if self._within else ""


def _page_reader(folder: Path, write: Any, texts_of: Any) -> Reader:
    """Writes a page with odd texts in it, which must stay texts."""
    file = folder / "page.html"
    write(file, ["a"] * 6)
    tags = _Page(file.read_text()).tags

    def draw(random: Random) -> Case:
        texts = [mutate_text(random, "a <b>cat</b> & </script>").value for _ in range(6)]
        return Case(repr(texts)[:200], texts)

    def read(texts: list[str]) -> str:
        write(file, texts)
        return file.read_text(encoding="utf-8")

    def check(texts: list[str], page: str) -> None:
        parsed = _Page(page)
        same(parsed.tags, tags, "the list of elements")
        data = json.loads(parsed.data, parse_constant=_refuse)
        same(texts_of(data), texts, "the texts")

    return Reader(draw, read, ["a"] * 6, check)


@reader(0.3)
def page_of_sweep(folder: Path) -> Reader:
    def write(file: Path, texts: list[str]) -> None:
        parts = {texts[3]: 1.0, texts[4] + "2": 0.5}
        record = {"mix": 0.5, "lora_timesteps": [9, 0], "n": 1, "reward_mean": None}
        record |= {f"reward/{name}_mean": 0.5 for name in parts}
        sweep_page.write_page(
            file,
            [record],
            [np.zeros((2, 8, 8, 3), np.uint8)],
            prompts=texts[:2],
            files=[texts[2]],
            model=texts[5],
            weights=parts,
            num_timesteps=10,
        )

    def texts_of(data: Any) -> list[str]:
        names = [score["name"].removeprefix("reward/") for score in data["scores"][1:]]
        model = data["model"]
        return [*data["prompts"], data["loras"][0]["name"], names[0], names[1][:-1], model]

    made = _page_reader(folder, write, texts_of)

    def draw(random: Random) -> Case:
        story, texts = made.draw(random)
        # Of what is a path, the last part is shown.
        texts[2], texts[3], texts[5] = lora_name(texts[2]), name_of(texts[3]), name_of(texts[5])
        texts[4] = name_of(texts[4] + "2")[:-1]
        return Case(story, texts)

    return Reader(draw, made.read, made.valid, made.check)


@reader(0.3)
def page_of_comparison(folder: Path) -> Reader:
    def write(file: Path, texts: list[str]) -> None:
        results = {"baseline": texts[0], "rewards": {texts[1]: {texts[2]: {"x": texts[3]}}}}
        run = SimpleNamespace(
            reward=texts[4],
            method=SimpleNamespace(name=texts[2]),
            config=SimpleNamespace(model=texts[5]),
            is_finished=lambda: False,
        )
        comparison_page.write_page(file, results, [run])

    def texts_of(data: Any) -> list[str]:
        ((reward, methods),) = data["rewards"].items()
        ((name, values),) = methods.items()
        return [data["baseline"], reward, name, values["x"], *data["pictures"], data["model"]]

    made = _page_reader(folder, write, texts_of)

    def draw(random: Random) -> Case:
        story, texts = made.draw(random)
        return Case(story, [*texts[:5], name_of(texts[5])])

    return Reader(draw, made.read, made.valid, made.check)
