"""Checkpoints in the original latent diffusion layout, of models that diffusers built.

What is written here is right if diffusers reads it back; the tests that use it show that first.
"""

import re

from tests.torch_pipeline import diffusers, randomize_parameters, torch, transformers

LAYERS_OF_VIT_H = 24
# Groups of 32 channels and, but in SD 1, heads of 64: what the format leaves unsaid.
_UNETS = {
    "sd1": {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 64},
    "sd2": {
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 192,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 128,
    },
}
_ATTENTION = {"sd1": (True, False), "sd2": (True, False), "sdxl": (False, True)}


def build_parts(family, vocab_size, max_length):
    """The networks of a tiny Stable Diffusion of a family, by the names of their components."""
    attention = _ATTENTION[family]
    down = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
    up = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
    unet = diffusers.UNet2DConditionModel(
        sample_size={"sd1": 256, "sd2": 384, "sdxl": 512}[family],
        layers_per_block=2,
        down_block_types=[down[has] for has in attention],
        up_block_types=[up[has] for has in reversed(attention)],
        **_UNETS[family],
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )

    def text_config(hidden_size, num_layers, hidden_act):
        return transformers.CLIPTextConfig(
            vocab_size=vocab_size,
            max_position_embeddings=max_length,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 64,
            projection_dim=hidden_size,
            hidden_act=hidden_act,
            eos_token_id=vocab_size - 1,
        )

    if family == "sd2":
        text = transformers.CLIPTextModel(text_config(64, LAYERS_OF_VIT_H - 1, "gelu"))
    else:
        text = transformers.CLIPTextModel(text_config(64, 2, "quick_gelu"))
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    if family == "sdxl":
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(
            text_config(128, 3, "gelu")
        )
    for seed, part in enumerate(parts.values()):
        randomize_parameters(part, seed)
    return parts


def to_ldm(family, parts):
    """The state dict of a single-file checkpoint that holds the parts."""
    state = {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(())}
    unet = to_ldm_unet(parts["unet"])
    state |= {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    state |= {f"first_stage_model.{name}": value for name, value in _vae(parts["vae"]).items()}
    text = parts["text_encoder"].state_dict()
    if family == "sd2":
        clip = _open_clip(text)
        # What the UNet does not use: the last layer, the projection, the temperature.
        last = {
            name.replace(".22.", ".23."): torch.full_like(value, 9.0)
            for name, value in clip.items()
            if ".22." in name
        }
        clip |= {**last, "text_projection": torch.full((64, 64), 9.0)}
        state |= _with_prefix("cond_stage_model.model.", clip)
    else:
        text = {f"text_model.{name.removeprefix('text_model.')}": text[name] for name in text}
        text["text_model.embeddings.position_ids"] = torch.arange(4)[None]
        prefix = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        state |= _with_prefix(f"{prefix}.transformer.", text)
    if family == "sdxl":
        clip = _open_clip(parts["text_encoder_2"].state_dict())
        state |= _with_prefix("conditioner.embedders.1.model.", clip)
    return {name: value.contiguous() for name, value in state.items()}


def _with_prefix(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def _substitute(name, pairs):
    for old, new in pairs:
        name = re.sub(old, new, name)
    return name


def to_ldm_unet(unet):
    """The weights of a UNet by their names in the original code, in the order of its own."""
    layers = unet.config.layers_per_block
    resnet = (
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    )
    place = r"(down|up|mid)_blocks?\.(\d\.)?(resnets|attentions|\w+samplers)\.(\d)"

    def rename(name):
        kind = re.match(place, name)
        if not kind:
            return _substitute(
                name,
                (
                    (r"^(time|add)_embedding.linear_1", r"\1_embed.0"),
                    (r"^(time|add)_embedding.linear_2", r"\1_embed.2"),
                    ("^add_embed", "label_emb.0"),
                    ("^conv_in", "input_blocks.0.0"),
                    ("^conv_norm_out", "out.0"),
                    ("^conv_out", "out.2"),
                ),
            )
        where, level, what, index = kind[1], int((kind[2] or "0.")[:-1]), kind[3], int(kind[4])
        rest = name[kind.end() + 1 :]
        if what == "resnets":
            rest = _substitute(rest, ((f"^{old}", new) for old, new in resnet))
        if where == "mid":
            return f"middle_block.{2 * index if what == 'resnets' else 1}.{rest}"
        if where == "down":
            start = 1 + level * (layers + 1)
            if what == "downsamplers":
                return f"input_blocks.{start + layers}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{start + index}.{int(what == 'attentions')}.{rest}"
        start = level * (layers + 1)
        if what == "upsamplers":
            # Behind the transformer, where there is one.
            block = unet.config.up_block_types[level]
            return f"output_blocks.{start + layers}.{2 if 'Cross' in block else 1}.{rest}"
        return f"output_blocks.{start + index}.{int(what == 'attentions')}.{rest}"

    return {rename(name): value for name, value in unet.state_dict().items()}


def _vae(vae):
    highest = len(vae.config.block_out_channels) - 1
    pairs = (
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)", lambda match: f"up.{highest - int(match[1])}"),
        (r"(up\.\d)\.resnets", r"\1.block"),
        (r"(up\.\d)\.upsamplers\.0", r"\1.upsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"to_([qkv])", r"\1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    )
    state = {}
    for name, value in vae.state_dict().items():
        projection = "attentions.0.to_" in name and name.endswith("weight")
        state[_substitute(name, pairs)] = value[:, :, None, None] if projection else value
    return state


def _open_clip(text):
    text = {name.removeprefix("text_model."): value for name, value in text.items()}
    pairs = (
        (r"^encoder\.layers\.", "transformer.resblocks."),
        ("layer_norm", "ln_"),
        ("self_attn", "attn"),
        ("fc1", "c_fc"),
        ("fc2", "c_proj"),
        (r"^embeddings\.token_", "token_"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        ("^final_ln_", "ln_final"),
    )
    state = {"logit_scale": torch.tensor(4.6), "attn_mask": torch.zeros(2, 2)}
    for name, value in text.items():
        if "q_proj" in name:
            parts = [text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, value = name.replace("q_proj.", "in_proj_"), torch.cat(parts)
        elif "k_proj" in name or "v_proj" in name:
            continue
        elif name == "text_projection.weight":
            name, value = "text_projection", value.T
        state[_substitute(name, pairs)] = value
    return state
