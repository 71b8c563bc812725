"""Draws images for prompts.

    python -m alignprop_jax.sample --model=emoji --prompts=prompts.txt --output=images

--output is a folder of PNGs, or a .npy file of float32 [B, H, W, 3] in [0, 1]. --latents takes the
noise from a .npy file of float32 [B, C, h, w], diffusers' layout, so that another program can be
given the same. --lora adds a LoRA, --lora A --lora B --mix 0.3 takes 0.3 A + 0.7 B, and
--lora_timesteps=1000:600 has it on in the early steps alone.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Key

from alignprop_jax.devices.compilation import compiler_options, enable_compilation_cache
from alignprop_jax.devices.distributed import on_every_host, on_main
from alignprop_jax.diffusion.sampling import make_sampler
from alignprop_jax.errors import UserError, run_program
from alignprop_jax.experiment import encode
from alignprop_jax.loading.pretrained import load_stable_diffusion
from alignprop_jax.lora.mixing import NO_LORA, LoraMix, define_lora_flags
from alignprop_jax.prompts.reading import load_prompts
from alignprop_jax.records.images import save_images
from alignprop_jax.records.progress import progress_bar
from alignprop_jax.records.whole_file import whole_file


def sample(
    model: str,
    prompts: list[str],
    *,
    lora: LoraMix = NO_LORA,
    latents: Path | None = None,
    negative_prompt: str = "",
    num_steps: int = 50,
    guidance_scale: float = 5.0,
    eta: float = 0.0,
    seed: int = 0,
    image_size: tuple[int, int] = (0, 0),
    batch_size: int = 8,
) -> Float[np.ndarray, "b H W 3"]:
    """Returns one image for each prompt, in [0, 1].

    An image follows from its prompt, its place in the list and the seed: the batch size has no part
    in it. See the flags for the arguments.

    Raises:
      UserError: a file cannot be read or does not fit the model, or a setting is not supported.
    """
    sd, params, tokenizers = load_stable_diffusion(model, image_size=image_size)
    run = make_sampler(sd, num_steps, guidance_scale, eta)
    factors = lora.load(params["unet"])
    latent_keys, sampler_keys = make_image_keys(seed, len(prompts))
    if latents:
        noise = read_latents(latents, len(prompts), sd.latent_shape)
    else:
        noise = jax.vmap(lambda key: jax.random.normal(key, sd.latent_shape))(latent_keys)
    encoded = encode(sd, params, tokenizers, [negative_prompt, *prompts])
    frozen = {"unet": params["unet"], "vae": params["vae"]}
    run = jax.jit(run, compiler_options=compiler_options())
    images = []
    batch_size = min(batch_size, len(prompts))
    with progress_bar(len(prompts), "sampling", "image") as progress:
        for start in range(0, len(prompts), batch_size):
            # The last batch is filled up with the last image: one compiled program serves all.
            rows = np.minimum(np.arange(start, start + batch_size), len(prompts) - 1)
            batch = run(
                frozen,
                factors,
                noise[rows],
                encoded[1 + rows],
                encoded[:1],
                sampler_keys[rows],
                lora_timesteps=lora.timesteps,
            )
            images.append(np.asarray(batch)[: len(prompts) - start])
            progress.update(len(images[-1]))
    return np.concatenate(images)


def make_image_keys(seed: int, number: int) -> Key[Array, "2 b"]:
    """Returns for each image the key of its first noise and that of the sampler's."""
    key = jax.random.key(seed)
    image_keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(number))
    return jax.vmap(jax.random.split, out_axes=1)(image_keys)


def read_latents(path: Path, number: int, shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """Reads noise of shape [B, C, h, w].

    Raises:
      UserError: the file is absent, no .npy file, or of another shape than the prompts and the
        model ask for.
    """
    try:
        latents = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"latents {str(path)!r} cannot be read as .npy: {error}") from error
    height, width, channels = shape
    expected = (number, channels, height, width)
    if latents.shape != expected:
        raise UserError(
            f"latents {str(path)!r} have shape {latents.shape}; {number} prompts and this model "
            f"need {expected}"
        )
    return jnp.asarray(latents, jnp.float32).transpose(0, 2, 3, 1)


@on_main
def write_output(path: Path, images: Float[np.ndarray, "b H W 3"], prompts: list[str]) -> None:
    """Writes a .npy file, or a folder of PNGs for any other name.

    Raises:
      UserError: the place cannot be written.
    """
    try:
        if path.suffix == ".npy":
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                np.save(file, images.astype(np.float32))
        else:
            save_images(path, images, prompts)
    except OSError as error:
        raise UserError(
            f"output {str(path)!r} cannot be written ({error.strerror}); give another --output"
        ) from error


def main(argv: list[str]) -> None:
    del argv
    enable_compilation_cache()
    prompts = load_prompts(_PROMPTS.value)
    images = sample(
        _MODEL.value,
        prompts,
        lora=_read_lora(),
        latents=Path(_LATENTS.value) if _LATENTS.value else None,
        negative_prompt=_NEGATIVE_PROMPT.value,
        num_steps=_NUM_STEPS.value,
        guidance_scale=_GUIDANCE_SCALE.value,
        eta=_ETA.value,
        seed=_SEED.value,
        image_size=(_HEIGHT.value, _WIDTH.value),
        batch_size=_BATCH_SIZE.value,
    )
    write_output(Path(_OUTPUT.value), images, prompts)
    print(f"{len(images)} images in {_OUTPUT.value}")


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string(
        "model",
        None,
        "diffusers folder, single file, hub id, or emoji for the model in the package",
        required=True,
    )
    _PROMPTS = flags.DEFINE_string(
        "prompts", None, "text file with one prompt a line, or a built-in list", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", None, "a .npy file or a folder of PNGs", required=True)
    _read_lora = define_lora_flags()
    _LATENTS = flags.DEFINE_string("latents", None, "noise to start from, .npy [B, C, h, w]")
    _NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "what to steer away from")
    _NUM_STEPS = flags.DEFINE_integer("num_steps", 50, "denoising steps", lower_bound=1)
    _GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 5.0, "1 for no guidance", lower_bound=1)
    _HEIGHT = flags.DEFINE_integer("height", 0, "pixels; 0: as trained on", lower_bound=0)
    _WIDTH = flags.DEFINE_integer("width", 0, "pixels; 0: as trained on", lower_bound=0)
    _ETA = flags.DEFINE_float("eta", 0.0, "noise of DDIM", lower_bound=0, upper_bound=1)
    _SEED = flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0)
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "images at a time", lower_bound=1)
    run_program(on_every_host(main))
