"""Scores a mix of two LoRAs at every share, and with the LoRAs on over ranges of timesteps.

    python -m alignprop_jax.sweep --config=configs/emoji.py:aesthetic --workdir=runs/sweep \\
        --lora=runs/a/lora --lora=runs/b/lora

At share alpha the weights change by alpha A + (1 - alpha) B; with one --lora, B is the base model.
Every point has the prompts of config.eval_prompts and the noise of the evaluations in training.
DIR/sweep.jsonl gets a line of scores for each alpha and range of timesteps. DIR/sweep.html, a page
on its own, shows curves and pictures behind a slider for either.
"""

import copy
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from alignprop_jax.config import define_config_flag, validate
from alignprop_jax.devices import distributed
from alignprop_jax.devices.compilation import enable_compilation_cache
from alignprop_jax.devices.cpu_devices import use_cores
from alignprop_jax.errors import run_program
from alignprop_jax.evaluation.evaluator import make_evaluator, make_judges, summarize
from alignprop_jax.evaluation.standardization import standardize_parts
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.lora.adapters import factors_of_network
from alignprop_jax.lora.factors import mix_loras
from alignprop_jax.lora.files import load_lora
from alignprop_jax.lora.mixing import LoraMix, parse_timesteps
from alignprop_jax.pages.sweep import MOST_PICTURES, write_page
from alignprop_jax.records import exhaustion
from alignprop_jax.records.lock import locked
from alignprop_jax.records.metrics import JsonLines, Record
from alignprop_jax.records.progress import progress_bar
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.rewards.base import Scorer
from alignprop_jax.runs.experiment import UNSEEN, load_experiment
from alignprop_jax.runs.same_run import has_scale_of, refuse_another_model
from alignprop_jax.runs.settings import at_a_time


def sweep(
    config: ConfigDict,
    path: epath.PathLike,
    files: Sequence[str],
    *,
    rewards: Sequence[str] = (),
    points: int = 11,
    ranges: Sequence[tuple[int, int]] = (),
    scorers: dict[str, Scorer] | None = None,
) -> list[Record]:
    """Scores every range of timesteps at every alpha.

    Args:
        config: of the run; its reward is scored, in all and by parts.
        path: the workdir.
        files: one LoRA file or two.
        rewards: names of further rewards to score.
        points: how many alphas, from 0 to 1 at equal distances.
        ranges: the highest and the lowest timestep at which the LoRAs are on, both included;
            `default_ranges` without any.
        scorers: judges to score by as well, those of `make_judges` by default.

    Returns:
        What sweep.jsonl holds, a record a point: mix (alpha), lora_timesteps, the number of samples
        n, mean and standard deviation of every score.

    Raises:
        UserError: the config, a file it names, a LoRA, a reward or the folder cannot be used;
            another process works in the folder, or it holds a run of another model; or the disk or
            the memory is full.
    """
    config = add_rewards(config, rewards)
    validate(config)
    LoraMix(tuple(files), mix=0.0)  # refuses what cannot be mixed before anything is loaded
    enable_compilation_cache()
    workdir = Workdir(path)
    with locked(workdir.path), exhaustion.named(workdir.path, exhaustion.images_of(config)):
        return _sweep(config, workdir, files, points, ranges, scorers)


def _sweep(
    config: ConfigDict,
    workdir: Workdir,
    files: Sequence[str],
    points: int,
    ranges: Sequence[tuple[int, int]],
    scorers: dict[str, Scorer] | None,
) -> list[Record]:
    shapes = adaptable_shapes(config.model)
    loras = [load_lora(file, shapes)[0] for file in files]
    alphas = [round(float(alpha), 4) for alpha in np.linspace(0.0, 1.0, points)]
    mixes = [mix_loras(alpha, *loras) for alpha in alphas]
    # The base model first: by its pictures rewards are scaled.
    experiment = load_experiment(config, loras=[None, *mixes])
    refuse_another_model(workdir, config, experiment)
    evaluator = standardize_parts(
        make_evaluator(config, experiment),
        workdir,
        is_known=functools.partial(has_scale_of, workdir, config),
        keep=not workdir.has_run(),
    )
    splits = [of_mix[UNSEEN] for of_mix in experiment.splits_of_loras[1:]]
    prompts = splits[0].prompts
    if scorers is None:
        scorers = make_judges(config, prompts)
    num_timesteps = experiment.generator.num_timesteps
    ranges = ranges or default_ranges(num_timesteps)

    lines = JsonLines(workdir.path / "sweep.jsonl")
    lines.keep(lambda record: False)
    pictures = []
    with progress_bar(points * len(ranges), "sweep", "point") as progress:
        points_of_range = list(zip(alphas, mixes, splits, strict=True))
        for timesteps, (alpha, mix, split) in itertools.product(ranges, points_of_range):
            evaluation = evaluator.evaluate(
                factors_of_network(mix), split, scorers, f"alpha {alpha:g}", timesteps
            )
            settings = {"mix": alpha, "lora_timesteps": list(timesteps)}
            lines.append(settings | summarize(evaluation))
            pictures.append(evaluation.images[:MOST_PICTURES])
            progress.update()
    records = distributed.from_main(lines.read())
    write_page(
        workdir.path / "sweep.html",
        records,
        pictures,
        prompts=prompts,
        files=files,
        model=config.model,
        weights=config.reward,
        num_timesteps=num_timesteps,
    )
    return records


def add_rewards(config: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """Returns a config of the same reward as a sum by parts, with further parts of weight 0."""
    weights = {config.reward: 1.0} if isinstance(config.reward, str) else dict(config.reward)
    config = copy.deepcopy(config)
    config.reward = weights | {name: 0.0 for name in names if name not in weights}
    return config


def default_ranges(num_timesteps: int) -> list[tuple[int, int]]:
    """Returns ranges from the first quarter of the denoising, over all of it, to the last."""
    quarters = [round(num_timesteps * quarter / 4) for quarter in range(5)]
    early = [(num_timesteps, low) for low in reversed(quarters[:-1])]
    return early + [(high, 0) for high in reversed(quarters[1:-1])]


def main(argv: list[str]) -> None:
    del argv
    use_cores(*at_a_time(_CONFIG.value))
    records = sweep(
        _CONFIG.value,
        _WORKDIR.value,
        _LORA.value,
        rewards=_REWARDS.value,
        points=_POINTS.value,
        ranges=[parse_timesteps(text) for text in _RANGES.value],
    )
    print(f"{len(records)} points; see {epath.Path(_WORKDIR.value) / 'sweep.html'}")


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder for the result", required=True)
    _LORA = flags.DEFINE_multi_string(
        "lora", None, "LoRA file; twice for a mix of two", required=True
    )
    _REWARDS = flags.DEFINE_list("rewards", [], "further rewards to score by, NAME,NAME,...")
    _POINTS = flags.DEFINE_integer("points", 11, "alphas from 0 to 1", 2, 1001)
    _RANGES = flags.DEFINE_multi_string(
        "lora_timesteps",
        [],
        "HIGH:LOW, timesteps at which the LoRAs are on, both ends included; may be repeated; "
        "by default seven ranges, from the first quarter of the denoising to the last",
    )
    run_program(distributed.on_every_host(main))
