"""The diffusion process and its DDIM sampler: tables of constants and pure step functions."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignprop_jax.errors import UserError
from alignprop_jax.inputs.foreign_json import (
    boolean,
    integer,
    list_of,
    number,
    one_of,
    optional,
    read_fields,
    text,
)

# More timesteps than any model was trained on, and few enough to lay a table of.
_MOST_TIMESTEPS = 100_000
# null is as good as false to diffusers.
_FLAG = optional(boolean(default=False))
_OFF = one_of(False, None, default=False)
# What files say for other solvers is not looked at, as in diffusers.
_SCHEMA = {
    "num_train_timesteps": integer(2, _MOST_TIMESTEPS),
    "beta_start": number(0, 1),
    "beta_end": number(0, 1),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": optional(list_of(number(0, 1), 2, _MOST_TIMESTEPS)),
    "clip_sample": _FLAG,
    "clip_sample_range": optional(number(1e-6, 1e6, default=1.0)),
    "set_alpha_to_one": _FLAG,
    "steps_offset": optional(integer(0, _MOST_TIMESTEPS, default=0)),
    "prediction_type": one_of("epsilon", "v_prediction", "sample"),
    "timestep_spacing": one_of("leading", "trailing", "linspace"),
    "rescale_betas_zero_snr": _FLAG,
}
_OF_ANY_SCHEDULER = {
    "_class_name": optional(text(default="DDIMScheduler")),
    "thresholding": _OFF,  # of models of pixels
    "use_flow_sigmas": _OFF,  # of models that betas do not define
}


class SamplerSteps(NamedTuple):
    """What a sampler of T steps needs to know of each, first step (most noise) first.

    A scan over it hands each step its own constants, as scalars.
    """

    timesteps: np.ndarray  # [T] int32, what the denoiser is told
    alpha_bar: np.ndarray  # [T] float32, signal power before the step
    alpha_bar_prev: np.ndarray  # [T] float32, signal power after the step
    sigma: np.ndarray  # [T] float32, standard deviation of the noise that the step adds
    direction: np.ndarray  # [T] float32, amplitude of the predicted noise that the step keeps

    def ending_at(self, index: Int[Array, ""]) -> "SamplerSteps":
        """The same steps, but the one at `index` ends at the x_0 that it predicts."""
        ends = jnp.arange(len(self.timesteps)) == index
        return self._replace(
            alpha_bar_prev=jnp.where(ends, 1.0, self.alpha_bar_prev),
            sigma=jnp.where(ends, 0.0, self.sigma),
            direction=jnp.where(ends, 0.0, self.direction),
        )

    def repeating_the_last(self, times: int) -> "SamplerSteps":
        """The same steps, and the last one so many times more."""
        return jax.tree.map(lambda x: np.append(x, np.repeat(x[-1:], times)), self)


@dataclasses.dataclass(frozen=True)
class DDIMScheduler:
    """Denoising diffusion implicit models (Song et al., arXiv 2010.02502), as diffusers sets it up.

    The fields have the names, meanings and defaults of diffusers' `DDIMScheduler`.

    Raises:
        UserError: the betas do not make a noise schedule.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"scheduler trained_betas has {len(self.trained_betas)} values, but "
                f"num_train_timesteps is {self.num_train_timesteps}; they must agree"
            )
        betas = self._betas()
        # Those that vanish beside 1 leave the first steps without any noise to divide by.
        if not np.all((1 - betas < 1) & (betas <= 1)):
            raise UserError(
                f"scheduler betas run from {betas.min():g} to {betas.max():g}; "
                "each must be above 6e-8 and at most 1"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DDIMScheduler":
        """Reads a diffusers `scheduler_config.json`.

        The file may have been written for another scheduler of the same family (Stable Diffusion
        1.5 ships PNDM's): the noise schedule is taken over, what belongs to the other solver is
        ignored, as `diffusers.DDIMScheduler.from_config` does.

        Args:
            config: the parsed file.

        Raises:
            UserError: a value is not supported, for one dynamic thresholding; or the scheduler is
              not defined by betas (flow matching, for example).
        """
        class_name = read_fields(config, _OF_ANY_SCHEDULER)["_class_name"]
        if class_name != cls.__name__ and not {"beta_start", "trained_betas"} & set(config):
            raise UserError(
                f"scheduler {class_name} has no betas, so it cannot be sampled with DDIM; "
                "use a model trained with a DDPM-style noise schedule"
            )
        said = {key: field for key, field in _SCHEMA.items() if key in config}
        return cls(**read_fields(config, said))

    def _betas(self) -> np.ndarray:
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, steps)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        else:
            # Nichol & Dhariwal, arXiv 2102.09672, eq. 17, with their cap on the last betas.
            times = np.arange(steps + 1) / steps
            alpha_bar = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        betas = betas.astype(np.float32)
        return _rescale_to_zero_snr(betas) if self.rescale_betas_zero_snr else betas

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """Signal power after t + 1 noising steps, the product of (1 - beta): [N] float32."""
        return _alpha_bar(self._betas())

    def plan(self, num_steps: int, eta: float = 0.0) -> SamplerSteps:
        """Lays out a sampler of `num_steps` steps.

        Args:
            num_steps: number of denoiser evaluations T.
            eta: 0 for the deterministic sampler, 1 for DDPM's noise (eq. 16 of arXiv 2010.02502).

        Returns:
            The constants of the T steps.

        Raises:
            UserError: when the noise schedule has no such steps.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise UserError(
                f"sampler num_steps is {num_steps}; this model's scheduler allows 1 to {total}"
            )
        if not 0 <= eta <= 1:
            raise UserError(f"sampler eta is {eta}; it must lie between 0 and 1")
        timesteps = self._timesteps(num_steps)
        if timesteps[0] >= total:
            raise UserError(
                f"sampler num_steps {num_steps} with steps_offset {self.steps_offset} reaches "
                f"timestep {timesteps[0]}, past the last one, {total - 1}; use fewer steps"
            )
        previous = timesteps - total // num_steps
        final_alpha_bar = 1.0 if self.set_alpha_to_one else self.alpha_bar[0]
        alpha_bar = self.alpha_bar[timesteps].astype(np.float64)
        alpha_bar_prev = np.where(
            previous >= 0, self.alpha_bar[np.maximum(previous, 0)], final_alpha_bar
        ).astype(np.float64)
        # A model that predicts v may start from pure noise, and no other, and no other step.
        if alpha_bar_prev.min() == 0 or (
            self.prediction_type == "epsilon" and alpha_bar.min() == 0
        ):
            raise UserError(
                f"timestep {timesteps[0]} holds no signal, which a model that predicts "
                f"{self.prediction_type} cannot start from here; set rescale_betas_zero_snr to "
                "false, or timestep_spacing to leading, in scheduler_config.json"
            )
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        sigma = eta * np.sqrt(variance)
        # In float32 this difference could lose every digit near pure noise at eta = 1.
        direction = np.sqrt(np.maximum(1 - alpha_bar_prev - sigma**2, 0))
        return SamplerSteps(
            timesteps.astype(np.int32),
            *(x.astype(np.float32) for x in (alpha_bar, alpha_bar_prev, sigma, direction)),
        )

    def at(self, timesteps: Int[Array, "*b"]) -> SamplerSteps:
        """The constants of steps from any timesteps to the clean sample."""
        alpha_bar = jnp.asarray(self.alpha_bar)[timesteps]
        zeros = jnp.zeros_like(alpha_bar)
        return SamplerSteps(timesteps, alpha_bar, jnp.ones_like(alpha_bar), zeros, zeros)

    def _timesteps(self, num_steps: int) -> np.ndarray:
        """Which timesteps are visited, in descending order: table 2 of arXiv 2305.08891."""
        total = self.num_train_timesteps
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, num_steps).round().astype(np.int64)[::-1]
        if self.timestep_spacing == "leading":
            return np.arange(num_steps)[::-1] * (total // num_steps) + self.steps_offset
        # Rounding errors of the increment can append a value next to zero: not a step.
        return np.arange(total, 0, -total / num_steps).round().astype(np.int64)[:num_steps] - 1

    def predict(
        self,
        model_output: Float[Array, "*shape"],
        x_t: Float[Array, "*shape"],
        alpha_bar: Float[Array, ""],
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """Splits a noisy sample into signal and noise by the model's output.

        Args:
            model_output: what the denoiser said of `x_t`, in this scheduler's prediction type.
            x_t: the noisy sample.
            alpha_bar: its signal power.

        Returns:
            The predicted (x_0, epsilon), x_0 clipped if the scheduler says so.
        """
        signal, noise = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
        if self.prediction_type == "epsilon":
            x_0, eps = (x_t - noise * model_output) / signal, model_output
        elif self.prediction_type == "v_prediction":
            x_0 = signal * x_t - noise * model_output
            eps = signal * model_output + noise * x_t
        else:
            x_0, eps = model_output, (x_t - signal * model_output) / noise
        if self.clip_sample:
            x_0 = jnp.clip(x_0, -self.clip_sample_range, self.clip_sample_range)
        return x_0, eps

    def step(
        self,
        model_output: Float[Array, "*shape"],
        x_t: Float[Array, "*shape"],
        at: SamplerSteps,
        noise: Float[Array, "*shape"] | None = None,
    ) -> Float[Array, "*shape"]:
        """One DDIM step, eq. 12 of arXiv 2010.02502.

        Args:
            model_output: what the denoiser said of `x_t`.
            x_t: the sample before the step.
            at: the constants of this step alone, each a scalar.
            noise: standard normal noise; None for the deterministic sampler, whose sigma is 0.

        Returns:
            The sample after the step.
        """
        x_0, eps = self.predict(model_output, x_t, at.alpha_bar)
        x_prev = jnp.sqrt(at.alpha_bar_prev) * x_0 + at.direction * eps
        return x_prev if noise is None else x_prev + at.sigma * noise

    def log_prob(
        self,
        model_output: Float[Array, "*shape"],
        x_t: Float[Array, "*shape"],
        x_prev: Float[Array, "*shape"],
        at: SamplerSteps,
    ) -> Float[Array, ""]:
        """How likely a DDIM step was to end where it did: its Gaussian's log-density.

        As DDPO's authors have it (arXiv 2305.13301), it is the mean over the elements of the
        sample, not their sum: the clip range of the importance weight is for that.

        Args:
            model_output: what the denoiser said of `x_t`.
            x_t: one sample before the step.
            x_prev: the sample after it.
            at: the constants of this step alone, each a scalar.

        Returns:
            The log-density; 0 for a step that adds no noise, whose density does not exist.
        """
        sigma = jnp.where(at.sigma > 0, at.sigma, 1.0)
        deviation = (x_prev - self.step(model_output, x_t, at)) / sigma
        log_density = -0.5 * deviation**2 - jnp.log(sigma) - 0.5 * math.log(2 * math.pi)
        return jnp.where(at.sigma > 0, jnp.mean(log_density), 0.0)

    def training_target(
        self,
        x_0: Float[Array, "*shape"],
        noise: Float[Array, "*shape"],
        alpha_bar: Float[Array, ""],
    ) -> Float[Array, "*shape"]:
        """What the denoiser is to say of `add_noise(x_0, noise, alpha_bar)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1 - alpha_bar) * x_0
        return x_0

    def add_noise(
        self,
        x_0: Float[Array, "*shape"],
        noise: Float[Array, "*shape"],
        alpha_bar: Float[Array, ""],
    ) -> Float[Array, "*shape"]:
        """The sample `x_0` among standard normal noise, eq. 4 of arXiv 2010.02502."""
        return jnp.sqrt(alpha_bar) * x_0 + jnp.sqrt(1 - alpha_bar) * noise


# Models are trained on tables that were rounded to float32 at each stage, and 1 - alpha_bar shows
# it where there is little noise. The next two functions round where diffusers does.


def _alpha_bar(betas: np.ndarray) -> np.ndarray:
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def _rescale_to_zero_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts the signal's amplitude to end at zero: Lin et al., arXiv 2305.08891, algorithm 1."""
    signal = np.sqrt(_alpha_bar(betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    alpha_bar = signal**2
    return 1 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
