"""Model folders: what loads, what is written, and what every fault is called."""

import functools
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from alignprop_jax.errors import UserError
from alignprop_jax.generators.stable_diffusion.load import load_stable_diffusion
from alignprop_jax.loading import pretrained
from alignprop_jax.loading.pretrained import (
    abstract_params,
    load_component,
    resolve_model,
    resolve_network,
)
from alignprop_jax.loading.tensor_files import read_tensors
from alignprop_jax.loading.weights import load_params, save_params, torch_name
from alignprop_jax.nn.clip import CLIPModel
from alignprop_jax.nn.execution import Execution
from tests import torch_pipeline
from tests.parity import params_from_torch
from tests.torch_pipeline import torch

COMPONENTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Most tests load the same architecture, whose tracing takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "abstract_params", functools.cache(abstract_params))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, torch_pipeline.build_torch_pipeline(folder)


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(written[0], tmp_path / "model")


def rewrite(path, change):
    """Replaces the tensors of a file by `change(tensors)`."""
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


def edit_config(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _dtypes(sd):
    return {module.dtype for module in (sd.unet, sd.vae, *sd.text_encoders)}


def test_pipeline_loads_whole(written):
    folder, pipeline = written
    sd, params, (tokenizer,) = load_stable_diffusion(str(folder))

    assert params.keys() == COMPONENTS.keys()
    modules = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.text_encoders[0]}
    for name, module in modules.items():
        assert_trees_equal(params[name], params_from_torch(getattr(pipeline, name), module))
    assert sd.unet.config.channels == (16, 32)
    assert sd.vae.config.scaling_factor == 0.18215
    assert sd.scheduler.steps_offset == 1 and not sd.scheduler.set_alpha_to_one
    assert tokenizer.model_max_length == torch_pipeline.MAX_LENGTH
    hash(sd)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_files_load_in_the_requested_type(folder, stored):
    for name, file in COMPONENTS.items():
        rewrite(
            folder / name / file,
            lambda tensors: {key: value.astype(stored) for key, value in tensors.items()},
        )
    sd, params, _ = load_stable_diffusion(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    kernel = params["unet"]["conv_out"]["kernel"]
    stored_kernel = load_file(folder / "unet" / COMPONENTS["unet"])["conv_out.weight"]
    np.testing.assert_array_equal(kernel, stored_kernel.astype("float32").transpose(2, 3, 1, 0))
    assert _dtypes(sd) == {jnp.dtype("float32")}


def test_bfloat16_can_be_asked_for(folder):
    sd, params, _ = load_stable_diffusion(folder, Execution(jnp.dtype("bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert _dtypes(sd) == {jnp.dtype("bfloat16")}


def test_older_names_and_buffers_load(written, folder):
    """Stable Diffusion 1.5's own files: a prefix, position ids, the VAE's first names."""

    def with_prefix(tensors):
        prefixed = {f"text_model.{name}": value for name, value in tensors.items()}
        positions = np.arange(torch_pipeline.MAX_LENGTH)[None]
        return {**prefixed, "text_model.embeddings.position_ids": positions}

    def first_names(tensors):
        for new, old in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            tensors = {name.replace(new, old): value for name, value in tensors.items()}
        return tensors

    rewrite(folder / "text_encoder" / COMPONENTS["text_encoder"], with_prefix)
    rewrite(folder / "vae" / COMPONENTS["vae"], first_names)
    _, params, _ = load_stable_diffusion(folder)
    _, expected, _ = load_stable_diffusion(written[0])
    assert_trees_equal(params, expected)


def test_sharded_weights_load(written, folder):
    written[1].unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    (folder / "unet" / COMPONENTS["unet"]).unlink()
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    sd, params, _ = load_stable_diffusion(folder)
    assert_trees_equal(params["unet"], params_from_torch(written[1].unet, sd.unet))

    shards[0].unlink()
    with pytest.raises(UserError, match=f"{shards[0].name}: no such file"):
        load_stable_diffusion(folder)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(UserError, match=f"{index.name}: lacks the key weight_map, which is an obj"):
        load_stable_diffusion(folder)
    for name in ("../../x.safetensors", "/x.bin", "..", "", "config.json", 1, None, ["x.bin"]):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(UserError, match=f"{index.name}: weight_map=.*name of a .safetensors"):
            load_stable_diffusion(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_variant_is_loaded_where_it_is_alone_or_asked_for(written, folder, sharded):
    """Of the very files that diffusers and transformers write for a variant."""
    half = torch_pipeline.build_torch_pipeline(folder, seed=7, dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16", max_shard_size="100KB" if sharded else "1GB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert index.exists() == sharded
    for name, file in COMPONENTS.items():
        shutil.copy(written[0] / name / file, folder / name)
    _, plain, _ = load_stable_diffusion(folder)
    _, expected, _ = load_stable_diffusion(written[0])
    assert_trees_equal(plain, expected)

    _, chosen, _ = load_stable_diffusion(f"{folder}:fp16")
    for name, file in COMPONENTS.items():
        (folder / name / file).unlink()
    sd, alone, _ = load_stable_diffusion(folder)
    assert_trees_equal(chosen, alone)
    assert_trees_equal(alone["unet"], params_from_torch(half.unet.float(), sd.unet))
    with pytest.raises(UserError, match="unet: no weights of the variant non_ema"):
        load_stable_diffusion(f"{folder}:non_ema")


def test_a_part_without_the_variant_is_read_without_it(written, folder, capsys):
    """As in diffusers, which the user hears of here."""
    for name in ("unet", "text_encoder"):
        file = folder / name / COMPONENTS[name]
        file.rename(file.with_suffix(".fp16.safetensors"))
    _, params, _ = load_stable_diffusion(f"{folder}:fp16")
    _, expected, _ = load_stable_diffusion(written[0])
    assert_trees_equal(params, expected)
    vae = f"{folder / 'vae'}: no weights of the variant fp16; {COMPONENTS['vae']} is read"
    assert capsys.readouterr().out == f"note: {vae}\n"
    pipeline = torch_pipeline.diffusers.StableDiffusionPipeline
    assert pipeline.from_pretrained(folder, variant="fp16").vae is not None


def test_clip_skip_in_the_config_leaves_the_last_layers_out(written, folder, capsys):
    """As models that were trained on the states before the last layer are passed on."""
    edit_config(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    sd, params, _ = load_stable_diffusion(folder)
    weights = folder / "text_encoder" / COMPONENTS["text_encoder"]
    assert capsys.readouterr().out == (
        f"note: {weights}: num_hidden_layers of config.json leaves out the last 1 of the text "
        "encoder's layers\n"
    )
    peer = torch_pipeline.transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    ids = np.arange(10)[None] % torch_pipeline.VOCAB_SIZE
    states = sd.text_encoders[0].apply({"params": params["text_encoder"]}, ids)
    expected = peer.eval()(torch.tensor(ids)).last_hidden_state.detach()
    np.testing.assert_allclose(states.last, expected, atol=1e-5)

    edit_config(folder / "text_encoder" / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"needs tensors text_model.encoder.layers.2\S+ .* missing"):
        load_stable_diffusion(folder)
    edit_config(folder / "text_encoder" / "config.json", num_hidden_layers=2)
    rewrite(weights, with_tensor("encoder.layers.2.other", 1))
    with pytest.raises(UserError, match="no place for tensor encoder.layers.2.other"):
        load_stable_diffusion(folder)


def test_a_tokenizer_of_another_encoder_is_refused(folder):
    size = torch_pipeline.VOCAB_SIZE
    tokenizer = torch_pipeline.transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<my-style>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match=f"tokenizer.* {size}, .*the text encoder knows"):
        load_stable_diffusion(folder)

    # The rows for the new tokens, as textual inversion adds them.
    weights = folder / "text_encoder" / COMPONENTS["text_encoder"]
    name = "embeddings.token_embedding.weight"
    rewrite(weights, lambda tensors: {**tensors, name: np.resize(tensors[name], (size + 1, 32))})
    edit_config(folder / "text_encoder" / "config.json", vocab_size=size + 1)
    load_stable_diffusion(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_load_with_pytorch_alone(written, folder, monkeypatch, sharded):
    for name, file in COMPONENTS.items():
        (folder / name / file).unlink()
        state = getattr(written[1], name).state_dict()
        stem = "pytorch_model" if name == "text_encoder" else "diffusion_pytorch_model"
        if not sharded:
            torch.save(state, folder / name / f"{stem}.bin")
            continue
        for shard in (0, 1):
            part = {key: state[key] for key in sorted(state)[shard::2]}
            torch.save(part, folder / name / f"{stem}-0000{shard + 1}-of-00002.bin")
        files = (f"{stem}-0000{1 + i % 2}-of-00002.bin" for i in range(len(state)))
        index = {"weight_map": dict(zip(sorted(state), files, strict=True))}
        (folder / name / f"{stem}.bin.index.json").write_text(json.dumps(index))
    _, params, _ = load_stable_diffusion(folder)
    _, expected, _ = load_stable_diffusion(written[0])
    assert_trees_equal(params, expected)

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"takes PyTorch to read: pip install 'alignprop_jax\[pic"):
        load_stable_diffusion(folder)


def test_what_is_written_loads_in_diffusers_and_transformers(written, folder):
    sd, params, _ = load_stable_diffusion(folder)
    for name, file in COMPONENTS.items():
        save_params(params[name], folder / name / file, np.float16)

    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    pipeline = torch_pipeline.diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for name in COMPONENTS:
        expected = getattr(written[1], name).state_dict()
        for key, value in getattr(pipeline, name).state_dict().items():
            np.testing.assert_array_equal(value, expected[key].half().float(), err_msg=key)
    assert not list(folder.rglob("*.partial"))


def test_names_of_the_tree_are_those_of_diffusers(written):
    sd, _, _ = load_stable_diffusion(written[0])
    ours = {torch_name(keys) for keys in flatten_dict(abstract_params(sd.unet))}
    assert ours == set(written[1].unet.state_dict())


def test_clip_loads_and_saves(tmp_path):
    peer = torch_pipeline.build_clip()
    peer.save_pretrained(tmp_path / "peer")
    clip, params = load_component(CLIPModel, tmp_path / "peer")
    assert_trees_equal(params, params_from_torch(peer, clip))

    shutil.copytree(tmp_path / "peer", tmp_path / "ours")
    save_params(params, tmp_path / "ours" / "model.safetensors")
    again = torch_pipeline.transformers.CLIPModel.from_pretrained(tmp_path / "ours")
    for key, value in again.state_dict().items():
        assert torch.equal(value, peer.state_dict()[key]), key


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name, *shape):
    return lambda tensors: {**tensors, name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        (
            "unet",
            without("conv_in.weight"),
            r"the model needs tensor conv_in.weight \[16, 4, 3, 3\], missing here",
        ),
        (
            "unet",
            lambda tensors: {},
            r"the model needs tensors (\S+ \[[\d, ]+\],? ?){3} and \d\d\d more, missing here",
        ),
        (
            "unet",
            with_tensor("extra.weight", 5, 7),
            r"the model has no place for tensor extra.weight \[5, 7\], found here",
        ),
        (
            "unet",
            with_tensor("time_embedding.linear_1.weight", 16, 64),
            r"tensor time_embedding.linear_1.weight has shape \[16, 64\], "
            r"the model needs \[64, 16\]",
        ),
        (
            "vae",
            with_tensor("decoder.conv_in.weight", 32, 4, 3),
            r"tensor decoder.conv_in.weight has shape \[32, 4, 3\], "
            r"the model needs \[32, 4, 3, 3\]",
        ),
        (
            "text_encoder",
            without("final_layer_norm.bias"),
            r"the model needs tensor text_model.final_layer_norm.bias \[32\], missing here",
        ),
        (
            "text_encoder",
            with_tensor("text_projection.weight", 16, 32),
            r"the model has no place for tensor text_projection.weight \[16, 32\], found here",
        ),
    ],
)
def test_tensor_that_does_not_fit_is_refused_by_name_and_shape(folder, component, change, message):
    rewrite(folder / component / COMPONENTS[component], change)
    with pytest.raises(UserError, match=f"{component}/{COMPONENTS[component]}: {message}"):
        load_stable_diffusion(folder)


@pytest.mark.parametrize("component", COMPONENTS)
def test_damaged_weights_are_refused(folder, component):
    path = folder / component / COMPONENTS[component]
    size = path.stat().st_size
    message = f"{component}/{path.name}: truncated, or not a safetensors file"
    for content in (path.read_bytes()[: size // 2], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_stable_diffusion(folder)


def test_missing_parts_are_refused_by_name(folder):
    def refused(message):
        with pytest.raises(UserError, match=message):
            load_stable_diffusion(folder)

    weights = folder / "vae" / COMPONENTS["vae"]
    weights.rename(folder / "vae" / "diffusion_pytorch_model.bin")
    refused("vae/diffusion_pytorch_model.bin: cannot be read as a checkpoint of PyTorch: it is dam")
    (folder / "vae" / "diffusion_pytorch_model.bin").unlink()
    refused("vae: no weights; a file diffusion_pytorch_model.safetensors or model.safetensors is")
    (folder / "vae" / "config.json").unlink()
    refused("vae/config.json: no such file")
    shutil.rmtree(folder / "vae")
    refused("no folder vae, so not a whole model")
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "scheduler")
    shutil.rmtree(folder / "unet")
    refused("no folder unet, so not a whole model")


def test_missing_tokenizer_and_scheduler_are_refused_by_name(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        load_stable_diffusion(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="scheduler/scheduler_config.json: no such file"):
        load_stable_diffusion(folder)


def test_config_that_cannot_be_followed_is_refused_by_name(folder):
    unet = folder / "unet" / "config.json"
    edit_config(unet, cross_attention_dim=48)
    with pytest.raises(UserError, match="attends to vectors of size 48, the text encoders give 32"):
        load_stable_diffusion(folder)
    edit_config(unet, cross_attention_dim=32, out_channels=8)
    with pytest.raises(UserError, match="gives 8 channels for 4; models that predict a variance"):
        load_stable_diffusion(folder)
    edit_config(unet, out_channels=4, sample_size=9)
    with pytest.raises(UserError, match="sample_size=9 is no multiple of 2, which its levels need"):
        load_stable_diffusion(folder)
    load_stable_diffusion(folder, image_size=(16, 16))
    edit_config(unet, sample_size=8, in_channels=9)
    with pytest.raises(UserError, match="takes 9 channels, .* have 4; models for inpainting and"):
        load_stable_diffusion(folder)
    edit_config(unet, class_embed_type="timestep")
    with pytest.raises(UserError, match='unet/config.json: class_embed_type="timestep" is not'):
        load_stable_diffusion(folder)
    unet.write_text("{}")
    with pytest.raises(UserError, match="unet/config.json: lacks the key block_out_channels"):
        load_stable_diffusion(folder)
    for content in (b"{", b"[]", b"\xff"):
        unet.write_bytes(content)
        with pytest.raises(UserError, match="unet/config.json: .* a JSON object"):
            load_stable_diffusion(folder)


def test_model_names(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setattr(pretrained, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="emoji: the model of the package is missing"):
        resolve_model("emoji")
    (tmp_path / "emoji").mkdir()
    assert resolve_model("emoji") == tmp_path / "emoji"
    for absent in ("./owner/name", "/owner/name", "name", "a/b/c", "~/name"):
        with pytest.raises(UserError, match=f"{absent}: no such folder or file; a model is"):
            resolve_model(absent)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="this is a file"):
        resolve_model(tmp_path / "file")
    # Neither may be asked of the hub.
    for absent in ("runs/model.safetensors", "owner/name/folder"):
        with pytest.raises(UserError, match=f"{absent}: no such folder or file; a model is"):
            resolve_model(absent)


def test_clip_of_the_package_stands_beside_its_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ASSETS", tmp_path)
    torch_pipeline.build_clip().save_pretrained(tmp_path / "emoji" / "clip")
    clip, _ = load_component(CLIPModel, resolve_network("emoji", "clip"))
    assert clip.config.projection_dim == 16


def test_a_type_that_numpy_has_not_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_torch_file({"proj.weight": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="tensor proj.weight is stored as F8_E4M3, which cannot"):
        list(read_tensors(path))


def test_scalars_embeddings_and_convolutions_survive_the_way_there_and_back(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "logit_scale": np.float32(2.5),
        "class_embedding": rng.standard_normal(3).astype(np.float32),
        "blocks.0": {
            "conv": {"kernel": rng.standard_normal((3, 3, 2, 5)).astype(np.float32)},
            "linear": {"kernel": rng.standard_normal((2, 5)).astype(np.float32)},
            "norm": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)},
            "tokens": {"embedding": rng.standard_normal((7, 2)).astype(np.float32)},
        },
    }
    path = tmp_path / "new" / "model.safetensors"
    save_params(tree, path)

    stored = load_file(path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        "logit_scale": (),
        "class_embedding": (3,),
        "blocks.0.conv.weight": (5, 2, 3, 3),
        "blocks.0.linear.weight": (5, 2),
        "blocks.0.norm.weight": (4,),
        "blocks.0.norm.bias": (4,),
        "blocks.0.tokens.weight": (7, 2),
    }
    np.testing.assert_array_equal(
        stored["blocks.0.conv.weight"][4, 1, 0, 2], tree["blocks.0"]["conv"]["kernel"][0, 2, 1, 4]
    )
    assert_trees_equal(load_params(jax.eval_shape(lambda: tree), path), tree)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save_params(tree, tmp_path / "file" / "model.safetensors")
