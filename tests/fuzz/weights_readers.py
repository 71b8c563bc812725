"""Readers of weights: safetensors, pickles, whole models in a file, and their tokenizers."""

import functools
import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np

from alignprop_jax.generators.stable_diffusion.single_file import SingleFileSource
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading import open_clip, open_clip_names
from alignprop_jax.loading.pretrained import resolve_model
from alignprop_jax.loading.tensor_files import read_metadata, read_shapes, read_tensors
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.loading.torch_file import read_pickle, read_pickle_shapes
from alignprop_jax.loading.weights import load_params, to_state_dict
from alignprop_jax.nn.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from alignprop_jax.nn.vae import AutoencoderKL, VAEConfig
from alignprop_jax.processes.ddim import DDIMScheduler
from alignprop_jax.rewards.aesthetic import load_head
from tests.fuzz import strategies
from tests.fuzz.config_readers import CLIP, TEXT, abstract, dumps
from tests.fuzz.reader import Files, Reader, reader, same
from tests.fuzz.strategies import Case, files, mutate_bytes, mutate_json, mutate_safetensors


def random_state(shapes: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a model, as a state dict."""
    generator = np.random.default_rng(seed)
    leaves = jax.tree.map(lambda x: generator.standard_normal(x.shape, np.float32), shapes)
    return to_state_dict(leaves)


def encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    header, data = strategies.safetensors_header(tensors, metadata or {})
    return strategies.write_safetensors(json.dumps(header), data)


@reader()
def safetensors_file(folder: Path) -> Reader:
    """Every tensor of a file, and the parameters of a text encoder from it."""
    expected_shapes = abstract(CLIPTextModel, CLIPTextConfig.from_dict(TEXT))
    tensors = random_state(expected_shapes)
    metadata = {"format": "pt", "modelspec.resolution": "8x8"}
    name = "model.safetensors"
    contents = Files(folder, {name: encode(tensors, metadata)})

    def draw(random: Random) -> Case:
        story, content = mutate_safetensors(random, tensors, metadata)
        return Case(story, {name: content})

    def read(folder: Path) -> Any:
        path = folder / name
        return (
            dict(read_tensors(path)),
            read_shapes(path),
            read_metadata(path),
            load_params(expected_shapes, path),
        )

    def check(value: Mapping[str, bytes], result: Any) -> None:
        read, shapes, metadata, params = result
        expected = strategies.read_safetensors(value[name])
        same(shapes, {key: tensor.shape for key, tensor in expected.items()}, "the shapes")
        same(set(read), set(expected), "the names")
        for key, tensor in expected.items():
            np.testing.assert_array_equal(np.asarray(read[key], tensor.dtype), tensor)
        for key, tensor in to_state_dict(params).items():
            said = next(
                v
                for k, v in expected.items()
                if k.removeprefix("text_model.") == key.removeprefix("text_model.")
            )
            np.testing.assert_array_equal(tensor, said.astype(np.float32))

    return contents.reader(draw, read, check)


@reader(0.5)
def weights_index(folder: Path) -> Reader:
    halves = [{"a": np.ones((2, 2), np.float32)}, {"b": np.zeros(3, np.float32)}]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    name = "model.safetensors.index.json"
    index = {"metadata": {"total_size": 28}, "weight_map": dict(zip("ab", shards, strict=True))}
    contents = {name: dumps(index)} | dict(zip(shards, map(encode, halves), strict=True))

    def check(value: Mapping[str, bytes], tensors: Any) -> None:
        files = json.loads(value[name].decode("utf-8-sig"))["weight_map"].values()
        held = [key for key, shard in zip("ab", shards, strict=True) if shard in files]
        same(sorted(tensors), held, "the tensors of the files that it lists")

    draw = files(mutate_json, {name: index})
    made = Files(folder, contents)
    return made.reader(draw, lambda f: dict(read_tensors(f / name)), check)


@reader(0.5)
def aesthetic_head(folder: Path) -> Reader:
    shapes = {"layers.0": (4, 8), "layers.2": (1, 4)}
    tensors = {f"{k}.weight": np.ones(shape, np.float32) for k, shape in shapes.items()}
    tensors |= {f"{k}.bias": np.ones(shape[:1], np.float32) for k, shape in shapes.items()}
    contents = Files(folder, {"head.safetensors": encode(tensors)})

    def draw(random: Random) -> Case:
        story, content = mutate_safetensors(random, tensors)
        return Case(story, {"head.safetensors": content})

    def check(value: Mapping[str, bytes], layers: Any) -> None:
        total = sum(float(leaf.sum()) for layer in layers for leaf in layer.values())
        expected = strategies.read_safetensors(value["head.safetensors"]).values()
        said = float(sum(tensor.astype(np.float32).sum() for tensor in expected))
        np.testing.assert_allclose(total, said, rtol=1e-5)

    return contents.reader(draw, lambda f: load_head(f / "head.safetensors"), check)


@reader(0.2)
def open_clip_file(folder: Path) -> Reader:
    """A CLIP in OpenCLIP's layout, as HPS has it."""
    config = CLIPConfig.from_dict(CLIP)
    state = random_state(abstract(CLIPModel, config))
    tensors = {}
    names = {new: old for old, new in open_clip_names._NAMES.items()}
    layers = {new: old for old, new in open_clip_names._LAYER_NAMES.items()}
    for name, tensor in state.items():
        match = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
        if match is None:
            old = names.get(name, name)
            tensors[old] = tensor.T if old in open_clip_names._TRANSPOSED else tensor
            continue
        tower = "visual." if match[1] == "vision" else ""
        stem = f"{tower}transformer.resblocks.{match[2]}"
        if match[3].endswith("q_proj"):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensors[f"{stem}.attn.in_proj_{match[4]}"] = np.concatenate(parts)
        elif match[3] in layers:
            tensors[f"{stem}.{layers[match[3]]}.{match[4]}"] = tensor
    tensors = {name: tensor.copy(order="C") for name, tensor in tensors.items()}
    contents = Files(folder, {"clip.safetensors": encode(tensors)})
    made = open_clip.load_open_clip(folder / "clip.safetensors", 2, 2)
    same(sorted(to_state_dict(made[1])), sorted(state), "the valid file")

    def draw(random: Random) -> Case:
        story, content = mutate_safetensors(random, tensors)
        return Case(story, {"clip.safetensors": content})

    def check(value: Mapping[str, bytes], result: Any) -> None:
        expected = strategies.read_safetensors(value["clip.safetensors"])
        held = sum(x.astype(float).sum() for x in to_state_dict(result[1]).values())
        said = sum(x.astype(np.float32).astype(float).sum() for x in expected.values())
        assert held == said or abs(held - said) < 1e-3 or not np.isfinite(said), "other values"

    return contents.reader(
        draw, lambda f: open_clip.load_open_clip(f / "clip.safetensors", 2, 2), check
    )


def _ldm(family: str) -> dict[str, np.ndarray]:
    """The tensors of a single file in the layout of the original code."""
    import diffusers
    import transformers

    from tests.loading.ldm_checkpoint import to_ldm

    is_xl = family == "sdxl"
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 24 + 64,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        layers_per_block=2,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=8 if family == "sd1" else 1,
        cross_attention_dim=128 if is_xl else 64,
        use_linear_projection=family != "sd1",
        **(xl if is_xl else {}),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )

    def text(layers: int) -> Any:
        return transformers.CLIPTextConfig(
            vocab_size=8,
            max_position_embeddings=4,
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=1,
            projection_dim=64,
        )

    parts = {"unet": unet, "vae": vae}
    parts["text_encoder"] = transformers.CLIPTextModel(text(23 if family == "sd2" else 1))
    if is_xl:
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(text(1))
    generator = np.random.default_rng(0)
    return {
        name: generator.integers(0, 9, tuple(tensor.shape)).astype(np.float16)
        for name, tensor in to_ldm(family, parts).items()
    }


_PARTS = {"unet": (UNet, UNetConfig), "vae": (AutoencoderKL, VAEConfig)}
_PARTS |= {"text_encoder": (CLIPTextModel, CLIPTextConfig)}


@reader(0.2)
def single_file(folder: Path) -> Reader:
    """A whole model in one safetensors file: what each part is, and its weights."""
    families = {family: _ldm(family) for family in ("sd1", "sd2", "sdxl")}
    metadata = {"modelspec.prediction_type": "epsilon", "modelspec.resolution": "512x512"}
    name = "model.safetensors"
    contents = Files(folder, {name: encode(families["sd1"])})

    def draw(random: Random) -> Case:
        family = random.choice(("sd1", "sd1", "sd2", "sdxl"))
        tensors, story = dict(families[family]), ""
        # A family of tensors at once, as other tools leave them out.
        if random.random() < 0.2:
            part = random.choice(sorted({".".join(key.split(".")[:4]) for key in tensors}))
            tensors = {key: x for key, x in tensors.items() if not key.startswith(part)}
            story = f"no {part}; "
        end, content = mutate_safetensors(random, tensors, metadata)
        return Case(f"{family}: {story}{end}", {name: content})

    def read(folder: Path) -> Any:
        source = SingleFileSource(folder / name)
        source.config("scheduler", DDIMScheduler.from_config)
        params = {}
        for part, (module, config_class) in _PARTS.items():
            config = source.config(part, config_class.from_dict)
            params[part] = source.params(part, abstract(module, config), np.float32)
        return params

    def check(value: Mapping[str, bytes], params: Any) -> None:
        tensors = strategies.read_safetensors(value[name])
        for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
            of_part = [x for key, x in tensors.items() if key.startswith(prefix)]
            held = sum(float(x.astype(float).sum()) for x in to_state_dict(params[part]).values())
            said = sum(float(x.astype(np.float32).astype(float).sum()) for x in of_part)
            same(held, said, f"the sum of the {part}")

    return contents.reader(draw, read, check)


@reader(0.5)
def pickle_file(folder: Path) -> Reader:
    """A state dict by torch.save, of today's format and of that before version 1.6."""
    import torch

    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()}

    def save(value: Any, old: bool = False) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=not old)
        return buffer.getvalue()

    @functools.cache
    def deflated(size: int = 0) -> bytes:
        """The same archive, packed; with a size, one record unpacks to far more than it is."""
        buffer = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(save(state))) as source,
            zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
        ):
            for record in source.namelist():
                content = source.read(record)
                target.writestr(
                    record, bytes(size) if size and record.endswith("data/0") else content
                )
        return buffer.getvalue()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = {
            "a list": save([1]),
            "a number": save(3),
            "a tensor": save(torch.ones(2)),
            "numbers for names": save({1: torch.ones(2)}),
            "bytes for names": save({b"a": torch.ones(2)}),
            "a number in it": save({"a": 1, "b": torch.ones(2)}),
            "sparse": save({"a": torch.eye(3).to_sparse()}),
            "complex": save({"a": torch.ones(2, dtype=torch.complex64)}),
            "quantized": save({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
            "with gradient": save({"a": torch.ones(2, requires_grad=True)}),
            "bfloat16": save({"a": torch.ones(2).bfloat16()}),
            "expanded": save({"a": torch.ones(1).expand(10**10)}),
            "on no device": save({"a": torch.ones(2, device="meta")}),
            "nested": save({"state_dict": {"state_dict": state}}),
            "empty": save({}),
            "a function": b"cposix\nsystem\n(S'echo no'\ntR.",
            "packed": deflated(),
            "a bomb": None,
            "a zip of nothing": b"PK\x05\x06" + bytes(18),
        }
    formats = (save(state), save({"state_dict": state, "epoch": 3}), save(state, old=True))
    contents = Files(folder, {"model.ckpt": formats[0]})

    def draw(random: Random) -> Case:
        if random.random() < 0.1:
            name = random.choice(list(others))
            return Case(name, {"model.ckpt": others[name] or deflated(5 << 28)})
        story, content = mutate_bytes(random, random.choice(formats))
        return Case(story, {"model.ckpt": content})

    def read(folder: Path) -> Any:
        path = folder / "model.ckpt"
        return dict(read_pickle(path)), read_pickle_shapes(path)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        tensors, shapes = result
        same({name: x.shape for name, x in tensors.items()}, shapes, "the shapes")
        assert all(type(name) is str for name in tensors), "a name that is no text"
        assert all(x.dtype == np.float32 for x in tensors.values()), "another type"
        try:
            peer = torch.load(io.BytesIO(value["model.ckpt"]), weights_only=True)
        except RuntimeError:
            # It is stricter about an archive's other bytes; the tensors may be whole.
            peer = state
        peer = peer.get("state_dict", peer)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, peer[name].detach().float().numpy())

    return contents.reader(draw, read, check)


@reader(0.3)
def tokenizer(folder: Path) -> Reader:
    emoji = resolve_model("emoji") / "tokenizer"
    whole = folder / "whole"
    load_tokenizer(emoji).save_pretrained(whole)
    layouts = []
    for source, names in (
        (emoji, ("vocab.json", "merges.txt")),
        (emoji, ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")),
        (whole, ("tokenizer.json", "tokenizer_config.json")),
    ):
        layouts.append({name: (source / name).read_bytes() for name in names})
    documents = [
        {name: json.loads(x) for name, x in layout.items() if name.endswith(".json")}
        for layout in layouts
    ]
    everything = dict.fromkeys(name for layout in layouts for name in layout)
    made = Files(folder / "used", layouts[1])

    def draw(random: Random) -> Case:
        number = random.choice((0, 1, 2))
        layout = layouts[number]
        name = random.choice(sorted(layout))
        if name in documents[number] and random.random() < 0.8:
            case = files(mutate_json, documents[number], (name,))(random)
        else:
            case = files(mutate_bytes, layout, (name,))(random)
        return Case(case.story, {**everything, **layout, **case.value})

    def read(folder: Path) -> Any:
        loaded = load_tokenizer(folder)
        return loaded, tokenize(loaded, ["a cat", "", "two dogs, a Fish!", "x" * 100])

    def check(value: Mapping[str, bytes], result: Any) -> None:
        loaded, ids = result
        assert ids.dtype == np.int32 and ids.ndim == 2 and len(ids) == 4
        assert 1 <= ids.shape[1] <= 2**16, f"{ids.shape[1]} tokens"
        assert (ids >= 0).all() and ids.max() < max(
            len(loaded), max(loaded.get_vocab().values()) + 1
        )

    return made.reader(draw, read, check)
