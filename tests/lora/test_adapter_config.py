"""PEFT's LoraConfig: written as PEFT saves it, and read with PEFT's meaning, in bounded time."""

import json
import time

import pytest

from alignprop_jax.errors import UserError
from alignprop_jax.lora.adapter_config import AdapterConfigs, lora_config

peft = pytest.importorskip("peft")
from peft.utils.other import get_pattern_key  # noqa: E402

LAYERS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.10.attn1.to_out.0",
    "up_blocks.1.attentions.0.proj_in",
    "conv_in",
]


def scales(tmp_path, **config):
    header = json.dumps({f"unet.{key}": value for key, value in config.items()})
    configs = AdapterConfigs(tmp_path / "lora.safetensors", header)
    return [configs.scale("unet", layer, 1) for layer in LAYERS]


@pytest.mark.parametrize("other", [{}, {"up_blocks.1.attentions.0.proj_in": 7}])
def test_config_is_what_peft_saves(other):
    ours = lora_config({**dict.fromkeys(LAYERS, 3), **other})
    saved = peft.LoraConfig(
        r=3, lora_alpha=3, target_modules=LAYERS, rank_pattern=other, alpha_pattern=other
    ).to_dict()
    saved["target_modules"] = sorted(saved["target_modules"])
    assert ours.items() <= saved.items()
    # diffusers 0.35 looks these up, empty or not.
    assert ours.keys() >= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    # What this release has besides is as it is without an entry.
    again = peft.LoraConfig(**json.loads(json.dumps(ours))).to_dict()
    assert again | {"target_modules": sorted(again["target_modules"])} == saved


@pytest.mark.parametrize(
    "patterns",
    [
        ["to_q"],
        ["attn1.to_q", "to_q"],
        ["to_q", "attn1.to_q"],
        ["o_q", "q", "in"],
        ["^conv_in", "^proj_in", "^to_q"],
        [r"to_out\.0", "to_out.0"],
        ["attn..to_q"],
        [".*to_q"],
        ["down_blocks.*attn2.*"],
        [r"transformer_blocks\.\d+\.attn1\.to_q$"],
        ["^down_blocks.*"],
        ["proj_in|conv_in"],
        ["proj_in$", "conv"],
        ["attn.?to_q", "x*conv_in"],
        [f"^{LAYERS[0]}", LAYERS[1]],
    ],
)
def test_patterns_mean_what_they_mean_to_peft(tmp_path, patterns):
    values = {pattern: float(2 + number) for number, pattern in enumerate(patterns)}
    expected = [values.get(get_pattern_key(values, layer), 1.0) for layer in LAYERS]
    assert scales(tmp_path, lora_alpha=1.0, alpha_pattern=values) == expected


def test_patterns_take_no_time(tmp_path):
    names = {f"^{layer}.{number}": 2.0 for number in range(1500) for layer in LAYERS}
    patterns = {f"{'a' * number}.*.*x": 2.0 for number in range(1, 100)}
    began = time.process_time()
    assert scales(tmp_path, lora_alpha=1.0, alpha_pattern=names | patterns) == [1.0] * 5
    assert time.process_time() - began < 2
    with pytest.raises(UserError, match="alpha_pattern has 101 regular expressions; 100 are"):
        scales(tmp_path, lora_alpha=1.0, alpha_pattern={f"x{n}.*": 1.0 for n in range(101)})
    with pytest.raises(UserError, match="alpha_pattern is not supported; it must be the name"):
        scales(tmp_path, lora_alpha=1.0, alpha_pattern={"x" * 400 + ".*": 1.0})
