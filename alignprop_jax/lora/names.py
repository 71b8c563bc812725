"""Which layer of a model a tensor of a LoRA file is for, by the names that tools give it.

- diffusers and PEFT: `unet.LAYER.lora_A.weight`, where the name of an adapter may stand before
  `weight`; `LAYER.lora.down.weight`, `LAYER.lora_linear_layer.down.weight`.
- diffusers before 0.22: `ATTENTION.processor.to_q_lora.down.weight`, in text encoders too.
- kohya's trainers: `lora_unet_LAYER_WITH_UNDERSCORES.lora_down.weight`, see `kohya`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from alignprop_jax.errors import UserError
from alignprop_jax.lora.factors import layer_shapes
from alignprop_jax.lora.kohya import PREFIXES, kohya_layers
from alignprop_jax.nn.stacked_layers import single_layers

UNET = "unet"

_PARTS = (UNET, "text_encoder", "text_encoder_2")
_FACTORS = {"A": "down", "B": "up", "down": "down", "up": "up"}
_TENSOR = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"lora_(?P<peft>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r"|(?P<alpha>alpha))"
)
_OLD_TENSOR = re.compile(r"(?P<layer>.+\.to_(?:q|k|v|out))_lora\.(?P<factor>down|up)\.weight")
# What diffusers before 0.22 called the projections of an attention.
_OLD_LAYERS = {
    UNET: {"to_out": "to_out.0"},
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
# What tells kinds of adapters apart that are no product of two factors.
_OTHER_KINDS = {
    "lora_magnitude_vector": "a DoRA",
    "dora_scale": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
    "lora_mid": "a LoRA of three factors (LoCon with use_tucker or use_cp)",
    "lora_embedding_": "a LoRA of an embedding",
    "lora_controlnet": "a Control-LoRA",
    "lora_B.bias": "a LoRA with biases",
    "modules_to_save": "an adapter with whole layers (modules_to_save)",
}


def adapts_text(parts: Mapping[str, Any] | None) -> bool:
    """Whether a LoRA by parts has factors of a text encoder; None is no LoRA."""
    return any(part != UNET for part in parts or {})


class Place(NamedTuple):
    """Of a tensor: part of the model, dotted name of the layer, and "down", "up" or "alpha"."""

    part: str
    layer: str
    factor: str


class Names:
    """The layers that a model has for a LoRA, by all names that files have for them.

    Attributes:
        layers: by part and dotted name, as `layer_shapes` gives them.
    """

    def __init__(self, params: Mapping[str, Any]):
        """Takes the parameters of the parts of a model, or anything of their shapes."""
        self.layers = {part: layer_shapes(tree) for part, tree in params.items()}
        self._others = {
            part: {
                ".".join(path[:-1])
                for every, leaf in flatten_dict(tree).items()
                for path, _ in single_layers(every, tuple(leaf.shape))
            }
            for part, tree in params.items()
        }
        self._kohya = kohya_layers(self.layers)

    def find(self, name: str) -> Place:
        """What a tensor is for.

        Raises:
            UserError: the name is no such one, or of a kind that is not supported, or of a layer
                that the model has not. The message begins with the name.
        """
        for marker, kind in _OTHER_KINDS.items():
            if marker in name:
                raise UserError(f"{name} is of {kind}, which is not supported; plain LoRAs are")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        place = self._dotted(name) if prefix is None else self._underscored(name, prefix)
        if place.part not in self.layers:
            raise UserError(
                f"{name} adapts {place.part}, which this model does not have; the LoRA was made "
                "for another model"
            )
        if place.layer in self.layers[place.part]:
            return place
        if place.layer in self._others[place.part]:
            raise UserError(
                f"{name} adapts a layer that is neither linear nor a convolution, which is not "
                "supported"
            )
        raise UserError(
            f"{name} is for a layer that this model does not have; the LoRA was made for another "
            "model"
        )

    def _underscored(self, name: str, prefix: str) -> Place:
        stem, _, kind = name.removeprefix(prefix).partition(".")
        factor = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}.get(kind)
        if factor is None:
            raise UserError(f"{name} is no tensor of a plain LoRA (lora_down, lora_up, alpha)")
        part = PREFIXES[prefix]
        return Place(part, self._kohya.get(part, {}).get(stem, stem), factor)

    def _dotted(self, name: str) -> Place:
        part = next((part for part in _PARTS if name.startswith(f"{part}.")), UNET)
        rest = name.removeprefix(f"{part}.").removeprefix("base_model.model.")
        rest = rest.replace(".processor.", ".")
        match, old = _TENSOR.fullmatch(rest), _OLD_TENSOR.fullmatch(rest)
        if old is not None:
            stem, _, last = old["layer"].rpartition(".")
            last = _OLD_LAYERS[UNET if part == UNET else "text"].get(last, last)
            layer, factor = f"{stem}.{last}", old["factor"]
        elif match is not None:
            layer = match["layer"]
            factor = match["alpha"] or _FACTORS[match["peft"] or match["diffusers"]]
        else:
            raise UserError(
                f"{name} is no tensor of a LoRA as diffusers or PEFT writes it "
                "(LAYER.lora_A.weight and LAYER.lora_B.weight)"
            )
        # transformers 5 leaves the prefix of a text tower that stands alone out.
        if part != UNET and layer not in self.layers.get(part, {}):
            prefixed = f"text_model.{layer}"
            layer = prefixed if prefixed in self.layers.get(part, {}) else layer
        return Place(part, layer, factor)
