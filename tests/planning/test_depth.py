"""Deep transformers, planned by shallow ones."""

import collections

import pytest

from alignprop_jax.config import load_config
from alignprop_jax.experiment import load_experiment
from alignprop_jax.planning.depth import deepest_transformer, extrapolate, with_layers
from alignprop_jax.planning.estimate import estimate
from alignprop_jax.planning.topology import Topology
from alignprop_jax.train_steps import create_state, trace_train_step
from tests import nano_run, torch_pipeline

LAYERS = 3


@pytest.fixture(scope="module")
def deep_config(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("deep")
    config = nano_run.write_nano_project(folder)
    unet = torch_pipeline.build_unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        transformer_layers_per_block=(LAYERS,),
    )
    unet.save_pretrained(folder / "model" / "unet", safe_serialization=True)
    return load_config(str(config))


def test_layers_are_taken_from_the_deepest_transformers_and_their_weights(deep_config):
    whole = load_experiment(deep_config)
    assert deepest_transformer(whole.sd.unet) == LAYERS
    shallow = with_layers(deep_config, whole, 1)
    transformer = shallow.params["unet"]["mid_block"]["attentions.0"]
    assert [name for name in transformer if name.startswith("transformer")] == [
        "transformer_blocks.0"
    ]
    # What is left is the weights themselves, and a train step that can be traced.
    whole_transformer = whole.params["unet"]["mid_block"]["attentions.0"]
    assert transformer["proj_in"]["kernel"] is whole_transformer["proj_in"]["kernel"]
    assert shallow.sd.unet.config.transformer_layers == (1,)
    trace_train_step(deep_config, shallow, create_state(deep_config, shallow))


def test_layers_beyond_two_add_as_much_as_the_second():
    one = collections.Counter(dot=10.0, tanh=3.0)
    two = collections.Counter(dot=16.0, tanh=3.0, copy=1.0)
    assert extrapolate(one, two, 10) == {"dot": 64.0, "tanh": 3.0, "copy": 9.0}
    assert extrapolate(one, two, 1) == one + collections.Counter()


@pytest.mark.slow
def test_what_is_extrapolated_is_what_the_compiler_says_of_all_layers(deep_config, monkeypatch):
    """Within 2%, by the TPU's compiler, which takes a minute for each of four programs."""
    pytest.importorskip("libtpu")
    topology = Topology.parse("v5e:2x2")
    deep_config.train.batch_size = 4
    extrapolated = estimate(deep_config, topology)
    assert extrapolated.layers == LAYERS
    monkeypatch.setattr("alignprop_jax.planning.estimate.MOST_LAYERS", LAYERS)
    whole = estimate(deep_config, topology)
    assert whole.layers is None
    assert extrapolated.seconds == pytest.approx(whole.seconds, rel=0.02)
    assert extrapolated.memory == pytest.approx(whole.memory, rel=0.1)
    assert extrapolated.arithmetic == whole.arithmetic
