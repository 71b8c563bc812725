"""Trains the model in the package from pictures of emoji, part by part.

Each part is written to `--output` in the layout of diffusers and transformers as soon as it is
trained. Killed and started again, the program goes on from the last checkpoint in `--workdir`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from alignprop_jax.devices.compilation import enable_compilation_cache
from alignprop_jax.errors import run_program
from alignprop_jax.generators.stable_diffusion.unet import UNet, UNetConfig
from alignprop_jax.loading.pretrained import initial_params, load_component
from alignprop_jax.loading.tokenizer import load_tokenizer, tokenize
from alignprop_jax.loading.weights import save_params
from alignprop_jax.nn.clip import CLIPModel, CLIPTextModel
from alignprop_jax.nn.owlvit import OwlViT, OwlViTConfig
from alignprop_jax.nn.vae import AutoencoderKL, VAEConfig
from alignprop_jax.processes.ddim import DDIMScheduler
from examples.emoji import export
from examples.emoji.aesthetic_head import (
    aesthetic_loss,
    embed_scenes,
    init_head,
    make_embedding_batches,
)
from examples.emoji.autoencoder import (
    make_autoencoder_loss,
    make_decoder_loss,
    make_image_batches,
)
from examples.emoji.captions import caption_words
from examples.emoji.contrastive import (
    make_caption_batches,
    make_contrastive_loss,
    train_clip_model,
)
from examples.emoji.detection import (
    embed_texts,
    make_detection_batches,
    make_detection_loss,
    query_texts,
    start_from_clip,
)
from examples.emoji.diffusion import make_diffusion_loss, make_latent_batches
from examples.emoji.emoji_dataset import prepare
from examples.emoji.fit import Recipe, fit
from examples.emoji.latents import encode_scenes
from examples.emoji.scenes import SceneMixture, SceneSampler
from examples.emoji.sprites import Sprites, load_sprites
from examples.emoji.tokenizer import build_tokenizer

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS = (
    "clip",
    "vision",
    "aesthetic_head",
    "detector",
    "scene_clip",
    "vae",
    "vae_scenes",
    "unet",
    "unet_scenes",
    "decoder",
)


def train_model(
    config: ConfigDict, data: Path, workdir: Path, output: Path, parts: Sequence[str] = PARTS
) -> None:
    """Trains `parts` in order.

    Args:
        data: the folder that examples/emoji/fetch_data.sh has filled.
        workdir: for checkpoints and intermediate data.
        output: the model's folder.
    """
    enable_compilation_cache()
    prepare(data, workdir / "data")
    sprites = load_sprites(workdir / "data")
    train = {
        "clip": train_clip,
        "vision": train_vision,
        "aesthetic_head": train_aesthetic_head,
        "detector": train_detector,
        "scene_clip": train_scene_clip,
        "vae": partial(train_autoencoder, "vae"),
        "vae_scenes": partial(train_autoencoder, "vae_scenes"),
        "unet": partial(train_unet, "unet"),
        "unet_scenes": partial(train_unet, "unet_scenes"),
        "decoder": train_decoder,
    }
    for part in parts:
        train[part](config, sprites, workdir, output)


def train_clip(config: ConfigDict, sprites: Sprites, workdir: Path, output: Path) -> None:
    """Builds the tokenizer and trains both towers of CLIP."""
    for folder in ("tokenizer", "clip"):
        build_tokenizer(caption_words(), output / folder)
    tokenizer = load_tokenizer(output / "tokenizer")
    config_json = export.clip_config(config.clip, tokenizer)
    batches = make_caption_batches(
        SceneSampler(sprites),
        tokenizer,
        config.clip.batch_size,
        config.clip.style_share,
        config.clip.degraded_share,
    )
    recipe = _recipe(config.clip)
    params = train_clip_model("clip", config_json, recipe, batches, workdir, config.seed)
    export.write_clip(output, config_json, params)


def train_vision(config: ConfigDict, sprites: Sprites, workdir: Path, output: Path) -> None:
    """Goes on training CLIP's vision tower, so that it tells styles and spoilt pictures apart.

    The text tower stays as the UNet knows it.
    """
    tokenizer = load_tokenizer(output / "tokenizer")
    clip, clip_params = load_component(CLIPModel, output / "clip")
    trained = {name: clip_params[name] for name in ("vision_model", "visual_projection")}
    frozen = {name: params for name, params in clip_params.items() if name not in trained}
    batches = make_caption_batches(
        SceneSampler(sprites),
        tokenizer,
        config.vision.batch_size,
        config.vision.style_share,
        config.vision.degraded_share,
    )
    loss = make_contrastive_loss(clip, frozen)
    params = fit("vision", _recipe(config.vision), loss, batches, trained, workdir, config.seed)
    export.write_clip(output, export.clip_config(config.clip, tokenizer), {**frozen, **params})


def train_aesthetic_head(config: ConfigDict, sprites: Sprites, workdir: Path, output: Path) -> None:
    """Trains the head of the aesthetic reward on embeddings of the finished CLIP."""
    clip, clip_params = load_component(CLIPModel, output / "clip")
    embeddings, scores = embed_scenes(
        clip,
        clip_params,
        SceneSampler(sprites),
        config.aesthetic_head.num_scenes,
        config.aesthetic_head.spoilt_share,
        config.seed,
    )
    head = fit(
        "aesthetic_head",
        _recipe(config.aesthetic_head),
        aesthetic_loss,
        make_embedding_batches(embeddings, scores, config.aesthetic_head.batch_size),
        init_head(config.seed, config.aesthetic_head.widths),
        workdir,
        config.seed,
    )
    save_params(head, output / "aesthetic_head.safetensors", np.float16)


def train_detector(config: ConfigDict, sprites: Sprites, workdir: Path, output: Path) -> None:
    """Trains an OWL-ViT that starts as the finished CLIP, whose text tower it keeps as it is."""
    build_tokenizer(caption_words(), output / "detector")
    tokenizer = load_tokenizer(output / "detector")
    _, clip_params = load_component(CLIPModel, output / "clip")
    config_json = export.detector_config(export.clip_config(config.clip, tokenizer))
    model = OwlViT(OwlViTConfig.from_dict(config_json))
    params = start_from_clip(initial_params(model, config.seed), clip_params)
    towers = params["owlvit"]
    frozen = {name: tree for name, tree in towers.items() if name != "vision_model"}
    names = sprites.unique_names
    queries = embed_texts(model, params, tokenizer, query_texts(names))
    trained = fit(
        "detector",
        _recipe(config.detector),
        make_detection_loss(model, frozen, queries, config.detector.noise),
        make_detection_batches(
            SceneSampler(sprites, SceneMixture(**config.detector.scenes)),
            names,
            config.detector.batch_size,
        ),
        {**params, "owlvit": {"vision_model": towers["vision_model"]}},
        workdir,
        config.seed,
    )
    trained = {**trained, "owlvit": {**frozen, **trained["owlvit"]}}
    export.write_detector(output, config_json, trained)


def train_scene_clip(config: ConfigDict, sprites: Sprites, workdir: Path, output: Path) -> None:
    """Trains the CLIP of the rewards of agreement, on scenes of several objects and colours."""
    recipe = config.scene_clip
    build_tokenizer(caption_words(), output / "scene_clip")
    tokenizer = load_tokenizer(output / "scene_clip")
    config_json = export.clip_config(recipe, tokenizer)
    batches = make_caption_batches(
        SceneSampler(sprites, SceneMixture(**recipe.scenes)),
        tokenizer,
        recipe.batch_size,
        recipe.style_share,
        recipe.degraded_share,
    )
    params = train_clip_model(
        "scene_clip", config_json, _recipe(recipe), batches, workdir, config.seed
    )
    export.write_clip_model(output / "scene_clip", config_json, params)


def train_autoencoder(
    part: str, config: ConfigDict, sprites: Sprites, workdir: Path, output: Path
) -> None:
    """Trains the autoencoder and measures the scale of its latents.

    It starts from the checkpoint in `workdir`, else from the autoencoder in `output`, else from
    scratch.

    Args:
        part: the section of the config with the recipe and the scenes.
    """
    recipe = config[part]
    config_json = export.vae_config(config.vae)
    if (output / "vae").is_dir():
        model, start = load_component(AutoencoderKL, output / "vae")
    else:
        model = AutoencoderKL(VAEConfig.from_dict(config_json))
        start = initial_params(model, config.seed)
    scenes = SceneSampler(sprites, SceneMixture(**recipe.scenes))
    params = fit(
        part,
        _recipe(recipe),
        make_autoencoder_loss(model, recipe.kl_weight),
        make_image_batches(scenes, recipe.batch_size),
        start,
        workdir,
        config.seed,
    )
    latents, _ = encode_scenes(model, params, scenes, num_scenes=512, seed=config.seed)
    config_json["scaling_factor"] = float(1.0 / latents.astype(np.float32).std())
    export.write_model(output / "vae", config_json, params, DIFFUSERS_WEIGHTS)


def train_decoder(config: ConfigDict, sprites: Sprites, workdir: Path, output: Path) -> None:
    """Goes on training the decoder alone, on latents that the UNet already knows."""
    vae, vae_params = load_component(AutoencoderKL, output / "vae")
    frozen = {name: vae_params[name] for name in ("encoder", "quant_conv")}
    scenes = SceneSampler(sprites, SceneMixture(**config.decoder.scenes))
    decoder = fit(
        "decoder",
        _recipe(config.decoder),
        make_decoder_loss(vae, frozen, config.decoder.latent_noise),
        make_image_batches(scenes, config.decoder.batch_size),
        {name: vae_params[name] for name in ("decoder", "post_quant_conv")},
        workdir,
        config.seed,
    )
    save_params({**frozen, **decoder}, output / "vae" / DIFFUSERS_WEIGHTS, np.float16)


def train_unet(
    part: str, config: ConfigDict, sprites: Sprites, workdir: Path, output: Path
) -> None:
    """Trains the UNet on encoded scenes with the text tower of CLIP.

    It starts from the checkpoint in `workdir`, else from the UNet in `output`, else from scratch.

    Args:
        part: the section of the config with the recipe and the scenes.
    """
    recipe = config[part]
    tokenizer = load_tokenizer(output / "tokenizer")
    text_encoder, text_params = load_component(CLIPTextModel, output / "text_encoder")
    vae, vae_params = load_component(AutoencoderKL, output / "vae")
    scheduler = DDIMScheduler.from_config(export.scheduler_config())

    scenes = SceneSampler(sprites, SceneMixture(**recipe.scenes))
    latents, captions = encode_scenes(
        vae,
        vae_params,
        scenes,
        recipe.num_scenes,
        config.seed,
        cache=workdir / f"{part}_latents.npz",
    )
    texts = ["", *sorted(set(captions))]
    row = {text: index for index, text in enumerate(texts)}
    states = jax.jit(text_encoder.apply)({"params": text_params}, tokenize(tokenizer, texts))
    config_json = export.unet_config(config.unet, vae.config, text_encoder.config)
    if (output / "unet").is_dir():
        model, start = load_component(UNet, output / "unet")
    else:
        model = UNet(UNetConfig.from_dict(config_json))
        start = _with_residuals_off(initial_params(model, config.seed))
    params = fit(
        part,
        _recipe(recipe),
        make_diffusion_loss(model, jnp.asarray(scheduler.alpha_bar), states.last),
        make_latent_batches(
            (latents * vae.config.scaling_factor).astype(np.float32),
            np.array([row[caption] for caption in captions]),
            recipe.batch_size,
            recipe.caption_dropout,
        ),
        start,
        workdir,
        config.seed,
    )
    export.write_model(output / "unet", config_json, params, DIFFUSERS_WEIGHTS)
    export.write_pipeline_index(output)


def _recipe(config: ConfigDict) -> Recipe:
    return Recipe(
        config.num_steps,
        config.batch_size,
        config.learning_rate,
        muon=config.get("muon", False),
    )


def _with_residuals_off(params):
    """Zeroes the last layer of every residual branch, so that the UNet starts simple."""
    last = ("conv2", "proj_out", "conv_out", "net.2", "to_out.0")

    def zero(path, leaf):
        return jnp.zeros_like(leaf) if path[-2].key in last else leaf

    return jax.tree_util.tree_map_with_path(zero, params)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.INFO)
    values = flags.FLAGS
    folders = (Path(values.data), Path(values.workdir), Path(values.output))
    train_model(values.config, *folders, values.part)


if __name__ == "__main__":
    # Not at import: defining the first one reads the recipe, below the current folder.
    config_flags.DEFINE_config_file("config", "examples/emoji/recipe.py", "The recipe.")
    flags.DEFINE_string("data", None, "Folder that examples/emoji/fetch_data.sh has filled.")
    flags.DEFINE_string("workdir", None, "Checkpoints and intermediate data.")
    flags.DEFINE_string("output", None, "Model folder to write.")
    flags.DEFINE_multi_enum("part", list(PARTS), PARTS, "Parts to train, in order.")
    flags.mark_flags_as_required(["data", "workdir", "output"])
    run_program(main)
