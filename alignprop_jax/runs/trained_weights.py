"""What a run leaves for other software: files of its LoRA, or of all weights of its UNet."""

import json

from ml_collections import ConfigDict

from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.config import to_json
from alignprop_jax.devices import sharding
from alignprop_jax.devices.distributed import is_main
from alignprop_jax.runs.experiment import Experiment
from alignprop_jax.loading.weights import save_params
from alignprop_jax.lora.factors import LoraTree, adapt
from alignprop_jax.lora.files import save_lora
from alignprop_jax.lora.kohya import save_kohya_lora
from alignprop_jax.records.places import name_of, reward_name, without_places
from alignprop_jax.records.workdir import Workdir


def save_trained(
    config: ConfigDict,
    experiment: Experiment,
    state: TrainState,
    workdir: Workdir,
    text: LoraTree | None = None,
) -> None:
    """Writes the LoRA for diffusers and PEFT, and for ComfyUI and A1111's web UI.

    After a full fine-tuning it writes the UNet, as it stands in a folder of diffusers.

    Args:
        text: factors of text encoders that the run began with, which belong to the same LoRA.
    """
    lora, unet_params = sharding.gather(state.lora), experiment.weights
    if not config.lora.rank:
        unet_params = sharding.gather(unet_params)
    if not is_main():
        return
    metadata = describe(config)
    if not config.lora.rank:
        save_params(adapt(unet_params, lora)["params"], workdir.unet, metadata=metadata)
        return
    alpha = config.lora.alpha
    save_lora(workdir.lora, lora, alpha, metadata, text)
    prediction_type = experiment.generator.scheduler.prediction_type
    save_kohya_lora(workdir.kohya_lora, lora, alpha, unet_params, prediction_type, metadata, text)


def describe(config: ConfigDict) -> dict[str, str]:
    """What files that are shared say of a run: names of its model and files, and no paths."""
    return {
        "base_model": name_of(config.model),
        "reward": reward_name(config.reward),
        "config": json.dumps(without_places(json.loads(to_json(config))), indent=2),
    }
