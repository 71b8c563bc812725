"""Draws images for prompts.

    python -m alignprop_jax.sample --model=emoji --prompts=prompts.txt --output=images

--output is a folder of PNGs, or a .npy file of float32 [B, H, W, 3] in [0, 1]. --latents takes the
noise from a .npy file of float32 [B, C, h, w], diffusers' layout, so that another program can be
given the same. --lora adds a LoRA, --lora A --lora B --mix 0.3 takes 0.3 A + 0.7 B, and
--lora_timesteps=1000:600 has it on in the early steps alone.
"""

import contextlib
import errno
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Key

from alignprop_jax.config import MOST_GUIDANCE, MOST_IMAGES, MOST_PIXELS, MOST_SEED, MOST_STEPS
from alignprop_jax.core.chain import Chain, Inputs
from alignprop_jax.core.finite import require_finite
from alignprop_jax.devices.compilation import compiler_options, enable_compilation_cache
from alignprop_jax.devices.distributed import on_every_host, on_main
from alignprop_jax.errors import UserError, run_program
from alignprop_jax.generators.load import load_generator
from alignprop_jax.inputs.flag_types import define_number
from alignprop_jax.loading.whole_file import whole_file
from alignprop_jax.lora.adapters import factors_of_network
from alignprop_jax.lora.mixing import NO_LORA, LoraMix, define_lora_flags
from alignprop_jax.prompts.reading import load_prompts
from alignprop_jax.records.images import save_images
from alignprop_jax.records.progress import progress_bar


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
      UserError: a file cannot be read or does not fit the model, a setting is not supported, or a
        sample is NaN or infinite.
    """
    loaded = load_generator(model, sample_size=image_size)
    generator, params = loaded.generator, loaded.params
    chain = Chain(generator, num_steps, generator.guidance(guidance_scale), eta)
    factors = lora.load(loaded.adaptable)
    adapter = factors_of_network(factors)
    latent_keys, sampler_keys = make_image_keys(seed, len(prompts))
    if latents:
        start = read_latents(latents, len(prompts), generator.latent_shape)
    else:
        start = jax.vmap(generator.start)(latent_keys)
    encoded = loaded.encode([negative_prompt, *prompts], factors)
    run = jax.jit(chain.sample, compiler_options=compiler_options())
    images = []
    batch_size = min(batch_size, len(prompts))
    with progress_bar(len(prompts), "sampling", "image") as progress:
        for first in range(0, len(prompts), batch_size):
            # The last batch is filled up with the last image: one compiled program serves all.
            rows = np.minimum(np.arange(first, first + batch_size), len(prompts) - 1)

            def pick(tree, rows=rows):
                return jax.tree.map(lambda x: x[rows], tree)

            inputs = Inputs(
                pick(start), pick(encoded, 1 + rows), pick(encoded, slice(1)), pick(sampler_keys)
            )
            batch = run(params, adapter, inputs, adapter_timesteps=lora.timesteps)
            images.append(np.asarray(batch)[: len(prompts) - first])
            require_finite(images[-1], prompts[first : first + batch_size])
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
      UserError: the file is absent, no .npy file of floats that are finite, or of another shape
        than the prompts and the model ask for.
    """
    name = f"latents {str(path)!r}"
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)  # an archive or a pickle has another
        # Not into memory before its shape is known.
        latents = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises whatever Python's parser does
        raise UserError(f"{name} cannot be read as .npy: {error}") from error
    height, width, channels = shape
    expected = (number, channels, height, width)
    if latents.shape != expected:
        raise UserError(
            f"{name} have shape {latents.shape}; {number} prompts and this model need {expected}"
        )
    if not np.issubdtype(latents.dtype, np.floating):
        raise UserError(f"{name} are of type {latents.dtype}; noise is of floats, such as float32")
    with np.errstate(over="ignore"):
        latents = np.asarray(latents, np.float32)
    if not np.isfinite(latents).all():
        raise UserError(f"{name} have values that are NaN, infinite or beyond float32")
    return jnp.asarray(latents).transpose(0, 2, 3, 1)


@on_main
def check_output(path: Path) -> None:
    """Makes the folder; raises UserError unless the output can be written there."""
    with _named_output(path):
        if path.suffix == ".npy" and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is there")
        folder = path.parent if path.suffix == ".npy" else path
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@on_main
def write_output(path: Path, images: Float[np.ndarray, "b H W 3"], prompts: list[str]) -> None:
    """Writes a .npy file, or a folder of PNGs for any other name.

    Raises:
      UserError: the place cannot be written.
    """
    check_output(path)
    with _named_output(path):
        if path.suffix == ".npy":
            with whole_file(path) as file:
                np.save(file, images.astype(np.float32))
        else:
            save_images(path, images, prompts)


@contextlib.contextmanager
def _named_output(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output {str(path)!r} cannot be written ({error.strerror}); give another --output"
        ) from error


def main(argv: list[str]) -> None:
    del argv
    enable_compilation_cache()
    # What is quick to find wrong comes before the samples.
    check_output(Path(_OUTPUT.value))
    prompts = load_prompts(_PROMPTS.value)
    lora = _read_lora()
    images = sample(
        _MODEL.value,
        prompts,
        lora=lora,
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
    flags.register_validator("output", bool, "a .npy file or a folder")
    _read_lora = define_lora_flags()
    _LATENTS = flags.DEFINE_string("latents", None, "noise to start from, .npy [B, C, h, w]")
    _NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "what to steer away from")
    # Bytes of a command line that are no text come as halves of surrogate pairs.
    flags.register_validator(
        "negative_prompt", lambda text: not re.search("[\ud800-\udfff]", text), "UTF-8 text"
    )
    _NUM_STEPS = flags.DEFINE_integer("num_steps", 50, "denoising steps", 1, MOST_STEPS)
    _GUIDANCE_SCALE = define_number("guidance_scale", 5.0, "1 for no guidance", 1, MOST_GUIDANCE)
    _HEIGHT = flags.DEFINE_integer("height", 0, "pixels; 0: as trained on", 0, MOST_PIXELS)
    _WIDTH = flags.DEFINE_integer("width", 0, "pixels; 0: as trained on", 0, MOST_PIXELS)
    _ETA = define_number("eta", 0.0, "noise of DDIM", 0, 1)
    _SEED = flags.DEFINE_integer("seed", 0, "of the noise", 0, MOST_SEED)
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "images at a time", 1, MOST_IMAGES)
    run_program(on_every_host(main))
