"""Readers of LoRA files, of every kind, and of a model that one is merged into."""

import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.tensor_files import read_metadata
from alignprop_jax.lora.factors import init_lora
from alignprop_jax.lora.files import load_lora, save_lora
from alignprop_jax.lora.kohya import save_kohya_lora
from alignprop_jax.lora.mixing import LoraMix
from alignprop_jax.merge import merge
from tests.fuzz import strategies
from tests.fuzz.config_readers import INDEX, TEXT, UNET, VAE, abstract, dumps
from tests.fuzz.reader import Files, Reader, reader, same
from tests.fuzz.strategies import Case, files, mutate_json, mutate_safetensors
from tests.fuzz.weights_readers import encode, random_state


def _lora_of(folder: Path) -> tuple[Any, dict[str, dict[str, np.ndarray]], dict[str, dict]]:
    """A UNet's shapes; tensors of a LoRA for it by kind of file, and their headers."""
    shapes = abstract(UNet, UNetConfig.from_dict(UNET))
    lora = init_lora(jax.random.key(0), shapes, 2, ("attn2.to_k", "to_out.0"))
    generator = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: generator.standard_normal(x.shape).astype(np.float32), lora)
    save_lora(folder / "ours.safetensors", lora, 3.0, {"base_model": "nano"})
    save_kohya_lora(folder / "kohya.safetensors", lora, 3.0, shapes, "epsilon")
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
    return shapes, tensors, headers


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
    shapes, tensors, headers = _lora_of(folder)
    name = "lora.safetensors"
    contents = Files(folder, {name: encode(tensors["ours"], headers["ours"])})

    def draw(random: Random) -> Case:
        kind = random.choice(("ours", "kohya", "old"))
        story, content = mutate_safetensors(random, tensors[kind], headers[kind])
        return Case(f"{kind}: {story}", {name: content})

    def check(value: Mapping[str, bytes], result: Any) -> None:
        # The adapter's metadata may have been changed to another scale.
        kept = headers["ours"]["lora_adapter_metadata"]
        header = json.loads(value[name][8 : 8 + int.from_bytes(value[name][:8], "little")])
        said = (header.get("__metadata__") or {}).get("lora_adapter_metadata")
        _check_lora(result[0]["unet"], value[name], compare=said in (None, kept))

    return contents.reader(draw, lambda f: load_lora(f / name, {"unet": shapes}), check)


@reader()
def lora_adapter(folder: Path) -> Reader:
    """The configuration of PEFT, in a file beside the factors and in the header of a file."""
    shapes, tensors, headers = _lora_of(folder)
    file, beside = "adapter_model.safetensors", "adapter_config.json"
    plain = {file: encode(tensors["peft"], headers["peft"]), beside: dumps(_ADAPTER)}
    contents = Files(folder / "peft", plain)
    in_header = {f"unet.{key}": value for key, value in _ADAPTER.items()}

    def draw(random: Random) -> Case:
        if random.random() < 0.5:
            return files(mutate_json, {beside: _ADAPTER})(random)
        story, content = mutate_json(random, in_header)
        metadata = {"lora_adapter_metadata": content.decode("utf-8", "surrogateescape")}
        content = encode(tensors["ours"], metadata)
        return Case(f"header: {story}", {file: content, beside: None})

    return contents.reader(
        draw,
        lambda f: load_lora(f, {"unet": shapes}),
        lambda value, result: _check_lora(result[0]["unet"], b"", compare=False),
    )


@reader(0.1)
def merged_model(folder: Path) -> Reader:
    """What `merge` reads of a model besides its weights."""
    shapes, tensors, headers = _lora_of(folder)
    source, output = folder / "model", folder / "merged"
    contents = {
        "model_index.json": dumps(INDEX),
        "unet/config.json": dumps(UNET),
        "unet/diffusion_pytorch_model.safetensors": encode(random_state(shapes)),
        "vae/config.json": dumps(VAE),
        "text_encoder/config.json": dumps(TEXT),
    }
    made = Files(source, contents)
    lora = LoraMix((str(folder / "ours.safetensors"),))
    draw = files(mutate_json, {"model_index.json": INDEX, "unet/config.json": UNET})

    def read(source: Path) -> None:
        try:
            merge(str(source), lora, output)
        finally:
            shutil.rmtree(output, ignore_errors=True)

    return made.reader(draw, read, culprits=[str(folder)])
