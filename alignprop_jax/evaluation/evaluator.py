"""Scores of a fixed set of samples: the same prompts and the same noise whenever it is asked."""

import collections
import copy
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Key
from ml_collections import ConfigDict

from alignprop_jax.algorithms.base import PromptTable
from alignprop_jax.core.chain import Inputs
from alignprop_jax.core.finite import require_finite
from alignprop_jax.core.generator import Adapter
from alignprop_jax.devices import sharding
from alignprop_jax.devices.compilation import compiler_options
from alignprop_jax.devices.distributed import is_main
from alignprop_jax.errors import note
from alignprop_jax.evaluation.bootstrap import confidence_interval
from alignprop_jax.evaluation.diversity import mean_distances
from alignprop_jax.evaluation.judges import find_judges, removal_judges
from alignprop_jax.loading.pretrained import resolve_model
from alignprop_jax.records.progress import progress_bar
from alignprop_jax.rewards.base import Scorer
from alignprop_jax.rewards.file_size import jpeg_kilobytes
from alignprop_jax.rewards.pixels import to_uint8
from alignprop_jax.rewards.weighted_sum import Statistics, standardize
from alignprop_jax.runs.experiment import Experiment, Split, make_keys


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of a split, and the first sample of every prompt as bytes [P, H, W, 3]."""

    prompts: list[str]
    scores: dict[str, np.ndarray]  # by scorer, one a sample
    images: np.ndarray


def images_of(evaluations: Mapping[str, Evaluation]) -> dict[str, np.ndarray]:
    """The pictures of several evaluations, by their names."""
    return {name: evaluation.images for name, evaluation in evaluations.items()}


_look_up = jax.jit(PromptTable.rows)


class Evaluator:
    """Samples prompts from fixed noise, in batches of one size, and lets scorers judge them.

    The noise of a sample follows from the key, the place of its prompt in the list and the number
    of the sample; the batch size has no part in it.
    """

    def __init__(
        self,
        experiment: Experiment,
        key: Key[jax.Array, ""],
        *,
        samples_per_prompt: int,
        batch_size: int,
    ):
        self.experiment = experiment
        self._samples_per_prompt = samples_per_prompt
        self._batch_size = batch_size
        self._rows_sharding = sharding.over_batch(experiment.mesh)
        # An argument, and no constant of the program, which serves every seed then.
        self._key = sharding.put(key, sharding.replicated(experiment.mesh))
        self._sample = jax.jit(self._sample_rows, compiler_options=compiler_options())
        self._score_rewards = jax.jit(
            experiment.reward.score_with_parts, compiler_options=compiler_options()
        )

    def evaluate(
        self,
        lora: Adapter | None,
        split: Split,
        scorers: dict[str, Scorer] | None = None,
        description: str = "evaluating",
        lora_timesteps: tuple[int, int] | None = None,
        limit: int | None = None,
    ) -> Evaluation:
        """Samples every prompt of a split and scores the samples.

        Args:
            lora: what is added to the model; None is the base model.
            split: the prompts.
            scorers: what judges the samples, by name, besides the reward. Where one gives
                embeddings, [b, d], the score of a sample is its mean distance to the others of its
                prompt, see `diversity`.
            description: of the progress bar.
            lora_timesteps: the highest and the lowest timestep at which the LoRA is on, both
                included; None for all.
            limit: of the number of samples.

        Returns:
            The scores: "reward", "reward/NAME" for each part of a sum of rewards, and those of
            `scorers`.

        Raises:
            UserError: a sample is NaN or infinite.
        """
        number = len(split.prompts)
        # All prompts once before any of them again.
        rows = np.arange(number * self._samples_per_prompt)[:limit]
        prompts = rows % number
        scores = collections.defaultdict(list)
        first_samples = []
        with progress_bar(len(rows), description, "image", leave=False) as progress:
            for start in range(0, len(rows), self._batch_size):
                batch = slice(start, min(start + self._batch_size, len(rows)))
                size = batch.stop - batch.start
                images, rewards = self._sample_and_score(
                    lora, split, prompts[batch], rows[batch], lora_timesteps
                )
                for name, values in rewards.items():
                    scores[name].append(values[:size])
                # Padding too, so that one program of a judge serves all batches.
                padded = np.pad(prompts[batch], (0, len(images) - size), mode="edge")
                texts = [split.prompts[index] for index in padded]
                require_finite(images[:size], texts[:size])
                for name, scorer in (scorers or {}).items():
                    scores[name].append(np.asarray(scorer(images, texts))[:size])
                first_samples.append(to_uint8(images[: max(0, min(size, number - start))]))
                progress.update(size)
        joined = {name: np.concatenate(parts) for name, parts in scores.items()}
        _say_what_is_not_finite(joined, description)
        return Evaluation(
            split.prompts,
            {
                name: mean_distances(values, prompts) if values.ndim == 2 else values
                for name, values in joined.items()
            },
            np.concatenate(first_samples),
        )

    def standardized(self, statistics: Statistics) -> "Evaluator":
        """An evaluator by the same programs whose sum of rewards has these statistics."""
        evaluator, experiment = copy.copy(self), self.experiment
        reward = standardize(experiment.reward, statistics)
        params = sharding.put(reward.params, sharding.of_frozen(reward.params, experiment.mesh))
        reward = dataclasses.replace(reward, params=params)
        evaluator.experiment = dataclasses.replace(experiment, reward=reward)
        return evaluator

    def preview(self, lora: Adapter | None, split: Split) -> tuple[np.ndarray, list[str]]:
        """Returns the first samples of a split, as many as make a batch, and their prompts.

        Raises:
            UserError: a sample is NaN or infinite.
        """
        rows = np.arange(min(self._batch_size, len(split.prompts)))
        images, _ = self._sample_batch(lora, split, rows, rows)
        images, prompts = sharding.gather(images)[: len(rows)], split.prompts[: len(rows)]
        require_finite(images, prompts)
        return to_uint8(images), prompts

    def _sample_and_score(self, lora, split, prompts, rows, lora_timesteps=None):
        """Images and rewards of a batch and its padding."""
        images, inputs = self._sample_batch(lora, split, prompts, rows, lora_timesteps)
        scored = self._score_rewards(self.experiment.reward.params, images, inputs)
        images, (scores, parts) = sharding.gather((images, scored))
        return images, {"reward": scores} | {f"reward/{name}": parts[name] for name in parts}

    def _sample_batch(self, lora, split, prompts, rows, lora_timesteps=None):
        """Images of a batch, which padding completes so that one program serves all.

        Also what the reward takes besides; all as it lies on the devices.
        """
        samples = rows // len(split.prompts)
        padding = (0, self._batch_size - len(rows))
        prompts, samples = (
            sharding.put(np.pad(x, padding, mode="edge").astype(np.int32), self._rows_sharding)
            for x in (prompts, samples)
        )
        experiment = self.experiment
        lora = sharding.put(lora, sharding.replicated(experiment.mesh))
        encoded, reward_inputs = _look_up(split.table, prompts)
        images = self._sample(
            self._key,
            experiment.params,
            lora,
            encoded,
            split.table.negative,
            prompts,
            samples,
            lora_timesteps,
        )
        return images, reward_inputs

    def _sample_rows(
        self, key, params, adapter, encoded, negative, prompts, samples, adapter_timesteps
    ):
        chain = self.experiment.chain

        def draw(prompt, sample):
            start_key, chain_key = jax.random.split(
                jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
            )
            return chain.generator.start(start_key), chain_key

        start, keys = jax.vmap(draw)(prompts, samples)
        inputs = Inputs(start, encoded, negative, keys)
        return chain.sample(params, adapter, inputs, adapter_timesteps=adapter_timesteps)


def _is_reward(name: str) -> bool:
    return name.partition("/")[0] == "reward"


def _say_what_is_not_finite(scores: dict[str, np.ndarray], description: str) -> None:
    """Of rewards alone: a judge says NaN where it has no opinion."""
    for name, values in scores.items():
        lost = np.count_nonzero(~np.isfinite(values))
        if lost and _is_reward(name):
            note(f"{name} is NaN or infinite for {lost} of {len(values)} samples, {description}")


def make_evaluator(config: ConfigDict, experiment: Experiment) -> Evaluator:
    """Returns the evaluator of a config; batches that fit in memory to train on do to evaluate."""
    return Evaluator(
        experiment,
        make_keys(config.train.seed).evaluation,
        samples_per_prompt=config.evaluation.samples_per_prompt,
        batch_size=config.train.microbatch_size or config.train.batch_size,
    )


def make_judges(config: ConfigDict, prompts: Sequence[str] = ()) -> dict[str, Scorer]:
    """Loads what judges the samples of a config besides its reward, by name.

    Those of its model (see `judges.load_judges`), "jpeg_kb" for a reward on the size of files, and
    those of what is to be removed (`judges.removal_judges`). The main process judges, which
    writes what they say; elsewhere there are none.

    Args:
        prompts: as for `judges.load_judges`.
    """
    if not is_main():
        return {}
    judges = find_judges(config.model, prompts)
    rewards = [config.reward] if isinstance(config.reward, str) else list(config.reward)
    if any(name.startswith("jpeg_") for name in rewards):
        judges["jpeg_kb"] = jpeg_kilobytes(config.jpeg.quality)
    if judges and "remove" in rewards:
        judges |= removal_judges(resolve_model(config.model) / "judges", config.remove.concept)
    return judges


def summarize(evaluation: Evaluation) -> dict[str, float]:
    """The number of samples n, and NAME_mean and NAME_std of every score.

    A judge gives NaN where it has no opinion, and those samples do not count for it; a judge that
    has none at all is left out.
    """
    summary: dict[str, float] = {"n": len(evaluation.scores["reward"])}
    for name, scores in evaluation.scores.items():
        if not _is_reward(name):
            scores = scores[~np.isnan(scores)]
        if scores.size:
            scores = scores.astype(np.float64)
            with np.errstate(invalid="ignore"):  # of an infinite reward
                summary[f"{name}_mean"] = float(scores.mean())
                summary[f"{name}_std"] = float(scores.std())
    return summary


def confidence_intervals(evaluation: Evaluation) -> dict[str, list[float]]:
    """NAME_ci95 of every score: both ends of the interval of its mean, see `bootstrap`.

    Scores of fewer than two prompts have none, nor has a reward that is not finite for all.
    """
    intervals = {}
    for name, scores in evaluation.scores.items():
        prompts = np.arange(len(scores)) % len(evaluation.prompts)
        known = np.isfinite(scores)
        if _is_reward(name) and not known.all():
            continue
        interval = confidence_interval(scores[known], prompts[known])
        if interval is not None:
            intervals[f"{name}_ci95"] = list(interval)
    return intervals
