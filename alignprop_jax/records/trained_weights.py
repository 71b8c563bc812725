"""What a run leaves for other software: files of its LoRA, or of all weights of its UNet."""

from ml_collections import ConfigDict

from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.config import to_json
from alignprop_jax.devices import sharding
from alignprop_jax.devices.distributed import is_main
from alignprop_jax.experiment import Experiment
from alignprop_jax.loading.weights import save_params
from alignprop_jax.lora.factors import adapt
from alignprop_jax.lora.files import save_lora
from alignprop_jax.lora.kohya import save_kohya_lora
from alignprop_jax.records.workdir import Workdir


def save_trained(
    config: ConfigDict, experiment: Experiment, state: TrainState, workdir: Workdir
) -> None:
    """Writes the LoRA for diffusers and PEFT, and for ComfyUI and A1111's web UI.

    After a full fine-tuning it writes the UNet, as it stands in a folder of diffusers.
    """
    lora, unet_params = sharding.gather(state.lora), experiment.weights
    if not config.lora.rank:
        unet_params = sharding.gather(unet_params)
    if not is_main():
        return
    metadata = {
        "base_model": config.model,
        "reward": experiment.reward.name,
        "config": to_json(config),
    }
    if not config.lora.rank:
        save_params(adapt(unet_params, lora)["params"], workdir.unet, metadata=metadata)
        return
    alpha = config.lora.alpha
    save_lora(workdir.lora, lora, alpha, metadata)
    prediction_type = experiment.generator.scheduler.prediction_type
    save_kohya_lora(workdir.kohya_lora, lora, alpha, unet_params, prediction_type, metadata)
