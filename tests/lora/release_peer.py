"""Draws with a LoRA file in whatever release of diffusers stands first on the path.

    python release_peer.py MODEL INPUTS.npz LORA OUTPUT.npz

It runs in an environment of its own and imports nothing of this project. INPUTS has the noise, the
token ids, and the text encoder's config and weights, for releases differ in how they store it.
"""

import json
import os
import sys

import diffusers
import numpy as np
import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

model, inputs_file, lora, output = sys.argv[1:]
inputs = dict(np.load(inputs_file))
unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")
text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**json.loads(str(inputs["config"]))))
weights = {
    name.removeprefix("text."): torch.from_numpy(array)
    for name, array in inputs.items()
    if name.startswith("text.")
}
if not hasattr(text, "text_model"):
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
missing, unexpected = text.load_state_dict(weights, strict=False)
assert not unexpected and not [name for name in missing if "position_ids" not in name], missing


def changes(module):
    """What PEFT says that an adapter adds to each layer."""
    return {
        name: layer.get_delta_weight(layer.active_adapters[0]).detach().numpy()
        for name, layer in module.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


pipeline = diffusers.StableDiffusionPipeline(
    vae=diffusers.AutoencoderKL.from_pretrained(model, subfolder="vae"),
    text_encoder=text,
    tokenizer=None,
    unet=unet,
    scheduler=diffusers.DDIMScheduler.from_pretrained(model, subfolder="scheduler"),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
pipeline.set_progress_bar_config(disable=True)
pipeline.load_lora_weights(os.path.dirname(lora), weight_name=os.path.basename(lora))
with torch.no_grad():
    embeddings = text(torch.from_numpy(inputs["ids"]))[0]
images = pipeline(
    prompt_embeds=embeddings[1:],
    negative_prompt_embeds=embeddings[:1].expand(len(embeddings) - 1, -1, -1),
    latents=torch.from_numpy(inputs["latents"]),
    num_inference_steps=3,
    guidance_scale=4.0,
    output_type="np",
).images
results = {f"diffusers.{name}": change for name, change in changes(unet).items()}

with safe_open(lora, framework="pt") as file:
    header = file.metadata()
if "lora_adapter_metadata" in header:
    # PEFT alone, with the config of the header.
    config = json.loads(header["lora_adapter_metadata"])
    config = {
        key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")
    }
    bare = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    bare = peft.inject_adapter_in_model(peft.LoraConfig(**config), bare)
    tensors = {
        name.removeprefix("unet."): tensor
        for name, tensor in load_file(lora).items()
        if name.startswith("unet.")
    }
    loaded = peft.set_peft_model_state_dict(bare, tensors)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    results |= {f"peft.{name}": change for name, change in changes(bare).items()}
versions = [diffusers.__version__, peft.__version__]
np.savez(output, images=images, versions=versions, **results)
