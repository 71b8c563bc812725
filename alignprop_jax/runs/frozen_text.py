"""The text encoders' part of the LoRA that a run goes on from: it applies, and is not trained."""

from pathlib import Path

from ml_collections import ConfigDict

from alignprop_jax.devices.distributed import from_main, is_main
from alignprop_jax.loading.buckets import local_copy
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.lora.factors import LoraTree
from alignprop_jax.lora.files import load_lora, save_parts
from alignprop_jax.lora.names import UNET
from alignprop_jax.records.workdir import Workdir


def load_frozen_text(config: ConfigDict, workdir: Workdir) -> LoraTree:
    """Reads that part of `config.lora.init`, by text encoder; empty where there is none.

    It is kept in the workdir: a run that is resumed has no more need of the file.

    Raises:
        UserError: as `load_lora`.
    """
    if not config.lora.init:
        return {}
    kept = workdir.text_lora
    resumed = from_main(workdir.has_run())
    if resumed and not from_main(kept.exists()):
        return {}
    # An absent one is reported where the UNet's factors are read.
    file = local_copy(kept) if resumed else Path(config.lora.init)
    if not file.exists():
        return {}
    loaded, _ = load_lora(file, adaptable_shapes(config.model))
    text = {part: tree for part, tree in loaded.items() if part != UNET}
    if text and not resumed and is_main():
        save_parts(kept, text)
    return text
