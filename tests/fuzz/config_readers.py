"""Readers of the JSON files that come with models."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from alignprop_jax.generators.stable_diffusion.pipeline_defaults import read_model_index
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import (
    abstract_params,
    resolve_model,
)
from alignprop_jax.loading.sources import FolderSource
from alignprop_jax.nn.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from alignprop_jax.nn.owlvit import OwlViT, OwlViTConfig
from alignprop_jax.nn.vae import AutoencoderKL, VAEConfig
from alignprop_jax.processes.ddim import DDIMScheduler
from alignprop_jax.rewards.preprocess import CLIPPreprocessor, OwlPreprocessor
from tests.fuzz.reader import Files, Reader, reader, same
from tests.fuzz.strategies import Case, files, mutate_json

# Of the smallest models that have every part.
UNET = json.loads("""{
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"], "layers_per_block": 1,
    "transformer_layers_per_block": 1, "attention_head_dim": 2, "num_attention_heads": null,
    "cross_attention_dim": 8, "norm_num_groups": 8, "norm_eps": 1e-05,
    "use_linear_projection": false, "flip_sin_to_cos": true, "freq_shift": 0, "act_fn": "silu",
    "addition_embed_type": null, "only_cross_attention": false,
    "mid_block_type": "UNetMidBlock2DCrossAttn"
}""")
XL = {"attention_head_dim": [2], "transformer_layers_per_block": [2]}
XL |= {"use_linear_projection": True, "addition_embed_type": "text_time"}
UNET_XL = UNET | XL | {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
VAE = json.loads("""{
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
    "block_out_channels": [16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8,
    "scaling_factor": 0.18215, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "act_fn": "silu", "use_quant_conv": true,
    "use_post_quant_conv": true, "force_upcast": true, "shift_factor": null
}""")
TEXT = json.loads("""{
    "model_type": "clip_text_model", "vocab_size": 30, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 5,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "projection_dim": 8, "eos_token_id": 29
}""")
VISION = json.loads("""{
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "model_type": "clip_vision_model",
    "image_size": 8, "patch_size": 4
}""")
CLIP = {"model_type": "clip", "projection_dim": 8, "text_config": TEXT, "vision_config": VISION}
SCHEDULER = json.loads("""{
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": null,
    "clip_sample": false, "clip_sample_range": 1.0, "set_alpha_to_one": false, "steps_offset": 1,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "rescale_betas_zero_snr": false,
    "thresholding": false
}""")
PREPROCESSOR = json.loads("""{
    "crop_size": {"height": 8, "width": 8}, "do_center_crop": true, "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4], "resample": 3, "size": {"shortest_edge": 8}
}""")
# Keys whose value stands as it is in a field of the same name, or of another.
_SAME = ("in_channels", "out_channels", "norm_num_groups", "layers_per_block", "norm_eps")
_SAME += ("freq_shift", "use_linear_projection", "latent_channels", "scaling_factor")
_SAME += ("use_quant_conv", "force_upcast", "hidden_act", "projection_dim", "vocab_size")
_SAME += ("hidden_size", "intermediate_size", "layer_norm_eps", "image_size", "patch_size")
_FIELDS = {key: key for key in _SAME} | {"block_out_channels": "channels"}
_FIELDS |= {
    "cross_attention_dim": "context_dim",
    "transformer_layers_per_block": "transformer_layers",
}
_FIELDS |= {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
_FIELDS |= {"max_position_embeddings": "max_length"}


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


@functools.lru_cache(maxsize=4096)
def abstract(module_class: type, config: Any) -> Any:
    return abstract_params(module_class(config))


def _check_fields(config: Any, document: Mapping[str, Any]) -> None:
    """Fields are of their types and of a size that can be, and what the file says, they hold."""
    for field in dataclasses.fields(config):
        held = getattr(config, field.name)
        if dataclasses.is_dataclass(held):
            _check_fields(held, document.get(f"{field.name}_config") or {})
            continue
        kind = str(getattr(field.type, "__name__", field.type)).partition("[")[0]
        kinds = (
            (int, float) if kind == "float" else {"int": int, "bool": bool, "str": str}.get(kind)
        )
        for item in held if isinstance(held, tuple) else (held,):
            fits = kinds is None or (
                isinstance(item, kinds) and (bool in (kinds, type(item))) == (kinds is bool)
            )
            assert fits, f"{field.name} holds {item!r}"
            assert isinstance(item, str) or abs(item) <= 2**31, f"{field.name} holds {item!r}"
    for key, name in _FIELDS.items():
        said, held = document.get(key), getattr(config, name, None)
        if said is None or held is None:
            continue
        held = list(held) if isinstance(held, tuple) else held
        wanted = [said] * len(held) if isinstance(held, list) and said != held else said
        assert held == wanted, f"{key} is {said!r} in the file, {held!r} here"


def _config_reader(folder: Path, documents: list[dict], module: type, parse: Callable) -> Reader:
    """A config.json; what is accepted can be built, and says what the file says."""
    contents = Files(folder, {"config.json": dumps(documents[0])})

    def draw(random: Random) -> Case:
        story, content = mutate_json(random, random.choice(documents))
        return Case(story, {"config.json": content})

    def read(folder: Path) -> Any:
        config = FolderSource(folder).config("", parse)
        abstract(module, config)
        return config

    def check(value: Mapping[str, bytes], config: Any) -> None:
        _check_fields(config, json.loads(value["config.json"].decode("utf-8-sig")))

    return contents.reader(draw, read, check)


@reader(0.5)
def unet_config(folder: Path) -> Reader:
    return _config_reader(folder, [UNET, UNET_XL], UNet, UNetConfig.from_dict)


@reader(0.5)
def vae_config(folder: Path) -> Reader:
    return _config_reader(folder, [VAE], AutoencoderKL, VAEConfig.from_dict)


@reader(0.5)
def text_config(folder: Path) -> Reader:
    return _config_reader(folder, [TEXT], CLIPTextModel, CLIPTextConfig.from_dict)


@reader(0.5)
def clip_config(folder: Path) -> Reader:
    return _config_reader(folder, [CLIP], CLIPModel, CLIPConfig.from_dict)


@reader(0.5)
def owlvit_config(folder: Path) -> Reader:
    documents = [CLIP | {"model_type": "owlvit"}, CLIP | {"model_type": "owlv2"}]
    return _config_reader(folder, documents, OwlViT, OwlViTConfig.from_dict)


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
        # Of keys that it does not know, it makes attributes.
        others = ("thresholding", "__class__")
        peer = Peer.from_config({k: v for k, v in document.items() if k not in others})
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
            return OwlPreprocessor.from_folder(folder, 8, pads=False)
        return CLIPPreprocessor.from_folder(folder, 8)

    def safely(folder: Path) -> Any:
        try:
            return read(folder)
        except (ValueError, OSError, RecursionError):
            return CLIPPreprocessor.from_folder(folder, 8)

    def check(value: Mapping[str, bytes], result: Any) -> None:
        same(result.size, 8, "the size")
        for numbers in (result.mean, result.std):
            assert len(numbers) == 3 and all(map(math.isfinite, numbers)), str(numbers)
        assert all(std > 0 for std in result.std), f"std {result.std}"
        document = json.loads(value[name].decode("utf-8-sig"))
        same(list(result.mean), [float(x) for x in document["image_mean"]], "mean")

    return contents.reader(draw, safely, check)


INDEX = json.loads((resolve_model("emoji") / "model_index.json").read_text())


@reader()
def model_index(folder: Path) -> Reader:
    document = INDEX | {"force_zeros_for_empty_prompt": True}
    contents = Files(folder, {"model_index.json": dumps(document)})

    def read(folder: Path) -> Any:
        return FolderSource(folder).config(
            "model_index", functools.partial(read_model_index, is_xl=True)
        )

    def check(value: Mapping[str, bytes], result: Any) -> None:
        assert type(result) is bool, repr(result)
        document = json.loads(value["model_index.json"].decode("utf-8-sig"))
        # null is no to diffusers' pipeline; yes is what it takes without the key.
        said = document.get("force_zeros_for_empty_prompt", True)
        same(result, said is True, "force_zeros_for_empty_prompt")

    draw = files(mutate_json, {"model_index.json": document})
    return contents.reader(draw, read, check)
