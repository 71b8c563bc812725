"""Readers of what others publish: configs, tokenizers, weights, LoRA, whole models in a file."""

import functools
import io
import json
import math
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from alignprop_jax.diffusion.schedulers import DDIMScheduler
from alignprop_jax.loading import open_clip
from alignprop_jax.loading.pretrained import (
    _zeroes_empty_prompts,
    abstract_params,
    resolve_model,
)
from alignprop_jax.loading.single_file import SingleFileSource
from alignprop_jax.loading.sources import FolderSource
from alignprop_jax.loading.tensor_files import (
    read_metadata,
    read_shapes,
    read_tensors,
)
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.loading.torch_file import read_pickle, read_pickle_shapes
from alignprop_jax.loading.weights import load_params, to_state_dict
from alignprop_jax.lora.factors import init_lora
from alignprop_jax.lora.files import load_lora, save_lora
from alignprop_jax.lora.kohya import save_kohya_lora
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.merge import merge
from alignprop_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from alignprop_jax.models.owlvit import OwlViT, OwlViTConfig
from alignprop_jax.models.unet import UNet, UNetConfig
from alignprop_jax.models.vae import AutoencoderKL, VAEConfig
from alignprop_jax.rewards.aesthetic import load_head
from alignprop_jax.rewards.preprocess import CLIPPreprocessor, OwlPreprocessor
from tests.fuzz import strategies
from tests.fuzz.reader import Files, Reader, reader, same
from tests.fuzz.strategies import Case, files, mutate_bytes, mutate_json, mutate_safetensors

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 2,
    "num_attention_heads": None,
    "cross_attention_dim": 8,
    "norm_num_groups": 8,
    "norm_eps": 1e-05,
    "use_linear_projection": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "act_fn": "silu",
    "addition_embed_type": None,
    "only_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
UNET_XL = UNET | {
    "attention_head_dim": [2],
    "transformer_layers_per_block": [2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "force_upcast": True,
    "shift_factor": None,
}
TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 5,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "projection_dim": 8,
    "eos_token_id": 29,
}
VISION = {key: TEXT[key] for key in list(TEXT)[2:6] + ["hidden_act", "layer_norm_eps"]}
VISION |= {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
CLIP = {
    "model_type": "clip",
    "projection_dim": 8,
    "text_config": TEXT,
    "vision_config": VISION,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}
PREPROCESSOR = {
    "crop_size": {"height": 8, "width": 8},
    "do_center_crop": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
    "size": {"shortest_edge": 8},
}
# Keys whose value stands as it is in a field of another name, or of the same.
_UNET_FIELDS = {"in_channels": "in_channels", "out_channels": "out_channels"}
_UNET_FIELDS |= {"block_out_channels": "channels", "layers_per_block": "layers_per_block"}
_UNET_FIELDS |= {"cross_attention_dim": "context_dim", "norm_num_groups": "norm_num_groups"}
_UNET_FIELDS |= {"norm_eps": "norm_eps", "freq_shift": "freq_shift"}
_UNET_FIELDS |= {"transformer_layers_per_block": "transformer_layers"}
_UNET_FIELDS |= {"use_linear_projection": "use_linear_projection"}
_VAE_FIELDS = {"block_out_channels": "channels"} | {key: key for key in list(VAE)[1:10]}
_VAE_FIELDS = {key: name for key, name in _VAE_FIELDS.items() if "block_types" not in key}
_VAE_FIELDS["block_out_channels"] = "channels"
_TEXT_FIELDS = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
_TEXT_FIELDS |= {"max_position_embeddings": "max_length"}
_TEXT_FIELDS |= {key: key for key in ("vocab_size", "hidden_size", "intermediate_size")}
_TEXT_FIELDS |= {"hidden_act": "hidden_act", "projection_dim": "projection_dim"}


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


@functools.lru_cache(maxsize=4096)
def _abstract(module_class: type, config: Any) -> Any:
    return abstract_params(module_class(config))


def _check_fields(config: Any, document: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """What the file says under a key is what the config holds."""
    for key, name in fields.items():
        said = document.get(key)
        if said is None:
            continue
        held = getattr(config, name)
        said = tuple(said) if isinstance(said, list) else said
        every = (said,) * len(held) if isinstance(held, tuple) else said
        assert held in (said, every) and type(said) in (type(held), int, float, type(every[:0]) if isinstance(every, tuple) else int), f"{key}: {held!r} of {said!r}"


def _check_values(value: Any, name: str = "config") -> None:
    """No text, no huge number and no NaN where sizes and factors belong."""
    if isinstance(value, tuple):
        for item in value:
            _check_values(item, name)
    elif isinstance(value, bool | str) or value is None:
        return
    elif isinstance(value, int | float):
        assert math.isfinite(value) and abs(value) <= 2**31, f"{name} holds {value!r}"
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            _check_values(getattr(value, field), field)
    else:
        raise AssertionError(f"{name} holds {value!r}")


def _config_reader(
    folder: Path, documents: list[dict], module: type, parse: Callable, fields: Mapping[str, str]
) -> Reader:
    """A config.json; what is accepted can be built, and says what the file says."""
    contents = Files(folder, {"config.json": dumps(documents[0])})

    def draw(random: Random) -> Case:
        story, content = mutate_json(random, random.choice(documents))
        return Case(story, {"config.json": content})

    def read(folder: Path) -> Any:
        config = FolderSource(folder).config("", parse)
        _abstract(module, config)
        return config

    def check(value: Mapping[str, bytes], config: Any) -> None:
        _check_values(config)
        document = json.loads(value["config.json"].decode("utf-8-sig"))
        _check_fields(config, document, fields)

    return contents.reader(draw, read, check)


@reader()
def unet_config(folder: Path) -> Reader:
    return _config_reader(folder, [UNET, UNET_XL], UNet, UNetConfig.from_dict, _UNET_FIELDS)


@reader()
def vae_config(folder: Path) -> Reader:
    return _config_reader(folder, [VAE], AutoencoderKL, VAEConfig.from_dict, _VAE_FIELDS)


@reader()
def text_config(folder: Path) -> Reader:
    return _config_reader(folder, [TEXT], CLIPTextModel, CLIPTextConfig.from_dict, _TEXT_FIELDS)


@reader()
def clip_config(folder: Path) -> Reader:
    return _config_reader(folder, [CLIP], CLIPModel, CLIPConfig.from_dict, {})


@reader()
def owlvit_config(folder: Path) -> Reader:
    documents = [CLIP | {"model_type": "owlvit"}, CLIP | {"model_type": "owlv2"}]
    return _config_reader(folder, documents, OwlViT, OwlViTConfig.from_dict, {})


@reader()
def scheduler_config(folder: Path) -> Reader:
    from diffusers import DDIMScheduler as Peer

    name = "scheduler/scheduler_config.json"
    pndm = {key: SCHEDULER[key] for key in ("num_train_timesteps", "beta_start", "beta_end")}
    pndm |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_schedule": "linear"}
    betas = SCHEDULER | {"trained_betas": [0.1, 0.2, 0.3, 0.4]}
    betas |= {"num_train_timesteps": 4, "steps_offset": 0}
    contents = Files(folder, {name: dumps(SCHEDULER)})

    def draw(random: Random) -> Case:
        story, content = mutate_json(random, random.choice((SCHEDULER, SCHEDULER, pndm, betas)))
        return Case(story, {name: content})

    def read(folder: Path) -> Any:
        scheduler = FolderSource(folder).config("scheduler", DDIMScheduler.from_config)
        return scheduler, scheduler.plan(min(4, scheduler.num_train_timesteps), 1.0)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        scheduler, plan = result
        assert scheduler.num_train_timesteps <= 10**6
        for array in plan:
            assert np.isfinite(array).all(), "a plan that is not finite"
        assert (0 <= plan.timesteps).all() and (plan.timesteps < len(scheduler.alpha_bar)).all()
        assert math.isfinite(scheduler.clip_sample_range) and scheduler.clip_sample_range > 0
        for flag in ("clip_sample", "set_alpha_to_one", "rescale_betas_zero_snr"):
            assert type(getattr(scheduler, flag)) is bool, flag
        document = json.loads(value[name].decode("utf-8-sig"))
        document = {k: v for k, v in document.items() if v is not None or k == "trained_betas"}
        peer = Peer.from_config({k: v for k, v in document.items() if k != "thresholding"})
        np.testing.assert_allclose(
            scheduler.alpha_bar, peer.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-7
        )

    culprits = [str(folder), "scheduler", "timestep"]
    return contents.reader(draw, read, check, culprits)


@reader()
def preprocessor_config(folder: Path) -> Reader:
    name = "preprocessor_config.json"
    owl = PREPROCESSOR | {"size": {"height": 8, "width": 8}, "do_center_crop": False}
    contents = Files(folder, {name: dumps(PREPROCESSOR)})

    def draw(random: Random) -> Case:
        return files(mutate_json, {name: random.choice((PREPROCESSOR, owl))})(random)

    def read(folder: Path) -> Any:
        document = json.loads((folder / name).read_bytes().decode("utf-8-sig"))
        size = document.get("size") if isinstance(document, dict) else None
        if isinstance(size, dict) and "height" in size:
            return OwlPreprocessor.from_folder(folder, pads=False)
        return CLIPPreprocessor.from_folder(folder)

    def safely(folder: Path) -> Any:
        try:
            return read(folder)
        except (ValueError, OSError, RecursionError):
            return CLIPPreprocessor.from_folder(folder)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        assert type(result.size) is int and 0 < result.size <= 2**16, f"size {result.size!r}"
        for numbers in (result.mean, result.std):
            assert len(numbers) == 3 and all(map(math.isfinite, numbers)), str(numbers)
        assert all(std > 0 for std in result.std), f"std {result.std}"
        document = json.loads(value[name].decode("utf-8-sig"))
        same(list(result.mean), [float(x) for x in document["image_mean"]], "mean")

    return contents.reader(draw, safely, check)


_INDEX = json.loads((resolve_model("emoji") / "model_index.json").read_text())


@reader()
def model_index(folder: Path) -> Reader:
    document = _INDEX | {"force_zeros_for_empty_prompt": True}
    contents = Files(folder, {"model_index.json": dumps(document)})

    def read(folder: Path) -> Any:
        return FolderSource(folder).config("model_index", _zeroes_empty_prompts)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        assert type(result) is bool, repr(result)
        document = json.loads(value["model_index.json"].decode("utf-8-sig"))
        said = document.get("force_zeros_for_empty_prompt")
        same(result, True if said is None else said, "force_zeros_for_empty_prompt")

    draw = files(mutate_json, {"model_index.json": document})
    return contents.reader(draw, read, check)


def _random_state(shapes: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a model, as a state dict."""
    generator = np.random.default_rng(seed)
    leaves = jax.tree.map(lambda x: generator.standard_normal(x.shape, np.float32), shapes)
    return to_state_dict(leaves)


def _encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    header, data = strategies.safetensors_header(tensors, metadata or {})
    return strategies.write_safetensors(json.dumps(header), data)


@reader()
def safetensors_file(folder: Path) -> Reader:
    """Every tensor of a file, and the parameters of a text encoder from it."""
    abstract = _abstract(CLIPTextModel, CLIPTextConfig.from_dict(TEXT))
    tensors = _random_state(abstract)
    metadata = {"format": "pt", "modelspec.resolution": "8x8"}
    name = "model.safetensors"
    contents = Files(folder, {name: _encode(tensors, metadata)})

    def draw(random: Random) -> Case:
        story, content = mutate_safetensors(random, tensors, metadata)
        return Case(story, {name: content})

    def read(folder: Path) -> Any:
        path = folder / name
        return (
            dict(read_tensors(path)),
            read_shapes(path),
            read_metadata(path),
            load_params(abstract, path),
        )

    def check(value: Mapping[str, bytes], result: Any) -> None:
        read, shapes, metadata, params = result
        expected = strategies.read_safetensors(value[name])
        same(shapes, {key: tensor.shape for key, tensor in expected.items()}, "the shapes")
        same(set(read), set(expected), "the names")
        for key, tensor in expected.items():
            np.testing.assert_array_equal(np.asarray(read[key], tensor.dtype), tensor)
        for key, tensor in to_state_dict(params).items():
            said = next(v for k, v in expected.items() if k.removeprefix("text_model.") == key.removeprefix("text_model."))
            np.testing.assert_array_equal(tensor, said.astype(np.float32))

    return contents.reader(draw, read, check)


@reader(0.5)
def weights_index(folder: Path) -> Reader:
    halves = [{"a": np.ones((2, 2), np.float32)}, {"b": np.zeros(3, np.float32)}]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    name = "model.safetensors.index.json"
    index = {"metadata": {"total_size": 28}, "weight_map": dict(zip("ab", shards, strict=True))}
    contents = {name: dumps(index)} | dict(zip(shards, map(_encode, halves), strict=True))

    def check(value: Mapping[str, bytes], tensors: Any) -> None:
        same(sorted(tensors), ["a", "b"], "the tensors")

    draw = files(mutate_json, {name: index})
    made = Files(folder, contents)
    return made.reader(draw, lambda f: dict(read_tensors(f / name)), check)


@reader(0.5)
def aesthetic_head(folder: Path) -> Reader:
    shapes = {"layers.0": (4, 8), "layers.2": (1, 4)}
    tensors = {f"{k}.weight": np.ones(shape, np.float32) for k, shape in shapes.items()}
    tensors |= {f"{k}.bias": np.ones(shape[:1], np.float32) for k, shape in shapes.items()}
    contents = Files(folder, {"head.safetensors": _encode(tensors)})

    def draw(random: Random) -> Case:
        story, content = mutate_safetensors(random, tensors)
        return Case(story, {"head.safetensors": content})

    def check(value: Mapping[str, bytes], layers: Any) -> None:
        total = sum(float(leaf.sum()) for layer in layers for leaf in layer.values())
        expected = strategies.read_safetensors(value["head.safetensors"]).values()
        same(total, float(sum(tensor.astype(np.float32).sum() for tensor in expected)), "the sum")

    return contents.reader(draw, lambda f: load_head(f / "head.safetensors"), check)


@reader(0.2)
def open_clip_file(folder: Path) -> Reader:
    """A CLIP in OpenCLIP's layout, as HPS has it."""
    config = CLIPConfig.from_dict(CLIP)
    state = _random_state(_abstract(CLIPModel, config))
    tensors = {}
    names = {new: old for old, new in open_clip_names()._NAMES.items()}
    layers = {new: old for old, new in open_clip_names()._LAYER_NAMES.items()}
    for name, tensor in state.items():
        match = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
        if match is None:
            old = names.get(name, name)
            tensors[old] = tensor.T if old in open_clip_names()._TRANSPOSED else tensor
            continue
        tower = "visual." if match[1] == "vision" else ""
        stem = f"{tower}transformer.resblocks.{match[2]}"
        if match[3].endswith("q_proj"):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensors[f"{stem}.attn.in_proj_{match[4]}"] = np.concatenate(parts)
        elif match[3] in layers:
            tensors[f"{stem}.{layers[match[3]]}.{match[4]}"] = tensor
    tensors = {name: tensor.copy(order="C") for name, tensor in tensors.items()}
    contents = Files(folder, {"clip.safetensors": _encode(tensors)})
    made = open_clip.load_open_clip(folder / "clip.safetensors", 2, 2)
    same(sorted(to_state_dict(made[1])), sorted(state), "the valid file")

    def draw(random: Random) -> Case:
        story, content = mutate_safetensors(random, tensors)
        return Case(story, {"clip.safetensors": content})

    def check(value: Mapping[str, bytes], result: Any) -> None:
        _check_values(result[0].config)
        expected = strategies.read_safetensors(value["clip.safetensors"])
        held = sum(x.astype(float).sum() for x in to_state_dict(result[1]).values())
        said = sum(x.astype(np.float32).astype(float).sum() for x in expected.values())
        assert held == said or abs(held - said) < 1e-3 or not np.isfinite(said), "other values"

    return contents.reader(
        draw, lambda f: open_clip.load_open_clip(f / "clip.safetensors", 2, 2), check
    )


def open_clip_names() -> Any:
    from alignprop_jax.loading import open_clip_names

    return open_clip_names


def _lora_of(folder: Path) -> tuple[Any, dict[str, dict[str, np.ndarray]], dict[str, dict]]:
    """A UNet's shapes; tensors of a LoRA for it by kind of file, and their headers."""
    abstract = _abstract(UNet, UNetConfig.from_dict(UNET))
    lora = init_lora(jax.random.key(0), abstract, 2, ("attn2.to_k", "to_out.0"))
    generator = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: generator.standard_normal(x.shape).astype(np.float32), lora)
    save_lora(folder / "ours.safetensors", lora, 3.0, {"base_model": "nano"})
    save_kohya_lora(folder / "kohya.safetensors", lora, 3.0, abstract, "epsilon")
    tensors, headers = {}, {}
    for kind in ("ours", "kohya"):
        tensors[kind] = strategies.read_safetensors((folder / f"{kind}.safetensors").read_bytes())
        headers[kind] = read_metadata(folder / f"{kind}.safetensors")
    ours = {name.removeprefix("unet."): tensor for name, tensor in tensors["ours"].items()}
    tensors["peft"] = {f"base_model.model.{name}": x for name, x in ours.items()}
    lora_names = (("lora_A", "lora.down"), ("lora_B", "lora.up"))
    tensors["old"] = {
        "unet." + functools.reduce(lambda n, pair: n.replace(*pair), lora_names, name): x
        for name, x in ours.items()
    }
    headers |= {"peft": {"format": "pt"}, "old": {}}
    return abstract, tensors, headers


_ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["to_k", "to_out.0"],
    "alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 5},
    "rank_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
}


def _changes(tree: Any) -> dict[str, np.ndarray]:
    flat = {keys: np.asarray(leaf, np.float64) for keys, leaf in flatten_dict(tree).items()}
    return {
        "_".join(keys[:-1]).replace(".", "_"): leaf @ flat[*keys[:-1], "up"]
        for keys, leaf in flat.items()
        if keys[-1] == "down"
    }


def _said_changes(content: bytes) -> dict[str, np.ndarray]:
    """What a file says each layer changes by, for a file without an adapter's own scale."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    kinds = {"lora_A.weight": "down", "lora_B.weight": "up", "lora.down.weight": "down"}
    kinds |= {"lora.up.weight": "up", "lora_down.weight": "down", "lora_up.weight": "up"}
    for name, tensor in strategies.read_safetensors(content).items():
        name = re.sub(r"^(unet\.|base_model\.model\.|lora_unet_)", "", name)
        kind = next((kind for kind in (*kinds, "alpha") if name.endswith(f".{kind}")), None)
        if kind is not None:
            layer = name.removesuffix(f".{kind}").replace(".", "_")
            layers.setdefault(layer, {})[kinds.get(kind, kind)] = tensor.astype(np.float64)
    for factors in layers.values():
        factors.setdefault("alpha", np.float64(len(factors["down"])))
    return {
        layer: (x["up"] @ x["down"]).T * x["alpha"].item() / len(x["down"])
        for layer, x in layers.items()
    }


def _check_lora(tree: Any, content: bytes, compare: bool) -> None:
    held = _changes(tree)
    for layer, change in held.items():
        assert np.isfinite(change).all(), f"{layer} is not finite"
    if compare:
        said = _said_changes(content)
        same(sorted(held), sorted(said), "the layers")
        for layer, change in held.items():
            np.testing.assert_allclose(change, said[layer], rtol=1e-3, atol=1e-5)


@reader()
def lora_file(folder: Path) -> Reader:
    """Files of this project, of diffusers old and new, and of kohya's trainers."""
    abstract, tensors, headers = _lora_of(folder)
    name = "lora.safetensors"
    contents = Files(folder, {name: _encode(tensors["ours"], headers["ours"])})

    def draw(random: Random) -> Case:
        kind = random.choice(("ours", "kohya", "old"))
        story, content = mutate_safetensors(random, tensors[kind], headers[kind])
        return Case(f"{kind}: {story}", {name: content})

    def check(value: Mapping[str, bytes], result: Any) -> None:
        # The adapter's metadata may have been changed to another scale.
        kept = headers["ours"]["lora_adapter_metadata"]
        header = json.loads(value[name][8 : 8 + int.from_bytes(value[name][:8], "little")])
        said = header.get("__metadata__", {}).get("lora_adapter_metadata")
        _check_lora(result[0], value[name], compare=said in (None, kept))

    return contents.reader(draw, lambda f: load_lora(f / name, abstract), check)


@reader()
def lora_adapter(folder: Path) -> Reader:
    """The configuration of PEFT, in a file beside the factors and in the header of a file."""
    abstract, tensors, headers = _lora_of(folder)
    file, beside = "adapter_model.safetensors", "adapter_config.json"
    plain = {file: _encode(tensors["peft"], headers["peft"]), beside: dumps(_ADAPTER)}
    contents = Files(folder / "peft", plain)
    in_header = {f"unet.{key}": value for key, value in _ADAPTER.items()}

    def draw(random: Random) -> Case:
        if random.random() < 0.5:
            return files(mutate_json, {beside: _ADAPTER})(random)
        story, content = mutate_json(random, in_header)
        metadata = {"lora_adapter_metadata": content.decode("utf-8", "surrogateescape")}
        content = _encode(tensors["ours"], metadata)
        return Case(f"header: {story}", {file: content, beside: None})

    return contents.reader(
        draw,
        lambda f: load_lora(f, abstract),
        lambda value, result: _check_lora(result[0], b"", compare=False),
    )


@reader(0.1)
def merged_model(folder: Path) -> Reader:
    """What `merge` reads of a model besides its weights."""
    abstract, tensors, headers = _lora_of(folder)
    source, output = folder / "model", folder / "merged"
    contents = {
        "model_index.json": dumps(_INDEX),
        "unet/config.json": dumps(UNET),
        "unet/diffusion_pytorch_model.safetensors": _encode(_random_state(abstract)),
        "vae/config.json": dumps(VAE),
    }
    made = Files(source, contents)
    lora = LoraMix((str(folder / "ours.safetensors"),))
    draw = files(mutate_json, {"model_index.json": _INDEX, "unet/config.json": UNET})

    def read(source: Path) -> None:
        try:
            merge(str(source), lora, output)
        finally:
            shutil.rmtree(output, ignore_errors=True)

    return made.reader(draw, read, culprits=[str(folder)])


def _ldm(family: str) -> dict[str, np.ndarray]:
    """The tensors of a single file in the layout of the original code, bytes for floats."""
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
        name: generator.integers(0, 9, tuple(tensor.shape), np.uint8)
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
    contents = Files(folder, {name: _encode(families["sd1"])})

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
            params[part] = source.params(part, _abstract(module, config), np.float32)
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
                target.writestr(record, bytes(size) if size and record.endswith("data/0") else content)
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
        peer = torch.load(io.BytesIO(value["model.ckpt"]), weights_only=True)
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
    made = Files(folder / "used", {})

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
        assert (ids >= 0).all() and ids.max() < max(len(loaded), max(loaded.get_vocab().values()) + 1)

    return made.reader(draw, read, check)
