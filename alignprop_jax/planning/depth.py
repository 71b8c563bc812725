"""How long a step of a model takes whose transformers are deep, from shallow ones.

Writing the code of Stable Diffusion XL, whose transformers have up to ten layers that are all
alike, takes the TPU's compiler hours. What a layer adds to a step shows between one and two.
"""

import collections
import dataclasses
from collections.abc import Mapping

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from alignprop_jax.experiment import Experiment, sampler_of
from alignprop_jax.loading.pretrained import abstract_params
from alignprop_jax.models.unet import UNet

# Of as few layers, a model is compiled as it is.
MOST_LAYERS = 2


def deepest_transformer(unet: UNet) -> int:
    """Layers of the UNet's deepest transformers."""
    return max(unet.config.transformer_layers)


def with_layers(config: ConfigDict, experiment: Experiment, layers: int) -> Experiment:
    """The experiment with only so many layers in the UNet's deepest transformers."""
    unet = experiment.sd.unet
    deepest = deepest_transformer(unet)
    per_level = tuple(layers if n == deepest else n for n in unet.config.transformer_layers)
    shallow = unet.clone(config=dataclasses.replace(unet.config, transformer_layers=per_level))
    kept = flatten_dict(abstract_params(shallow))
    weights = flatten_dict(experiment.params["unet"])
    sd = dataclasses.replace(experiment.sd, unet=shallow)
    return dataclasses.replace(
        experiment,
        sd=sd,
        params=experiment.params | {"unet": unflatten_dict({path: weights[path] for path in kept})},
        sample=sampler_of(config, sd, experiment.remat),
    )


def extrapolate(
    one: Mapping[str, float], two: Mapping[str, float], layers: int
) -> collections.Counter:
    """What `layers` layers take, of whatever one and two of them do: a line through both."""
    names = one.keys() | two.keys()
    return collections.Counter(
        {
            name: one.get(name, 0) + (layers - 1) * (two.get(name, 0) - one.get(name, 0))
            for name in names
        }
    )
