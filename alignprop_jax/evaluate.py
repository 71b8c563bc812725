"""Scores a trained LoRA, or the base model, on the prompts of a config.

    python -m alignprop_jax.evaluate --config=configs/emoji.py:aesthetic --workdir=runs/aesthetic

Without --lora it takes the one that training left in the workdir; --lora=none is the base model,
--lora A --lora B takes one after the other, with --mix 0.3 it is 0.3 A + 0.7 B, and
--lora_timesteps=1000:600 has it on in the early steps alone. --rewards=NAME,NAME scores by further
rewards. The samples have the prompts and the noise of the evaluations in training; another
--config.prompts or --config.train.seed has others. DIR/evaluation.json gets the scores, DIR/images
the pictures.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from alignprop_jax.config import define_config_flag, validate
from alignprop_jax.devices import distributed
from alignprop_jax.devices.compilation import enable_compilation_cache
from alignprop_jax.devices.cpu_devices import use_cores
from alignprop_jax.errors import UserError, run_program
from alignprop_jax.evaluation.evaluator import (
    confidence_intervals,
    make_evaluator,
    make_judges,
    summarize,
)
from alignprop_jax.evaluation.judges import reward_scorer
from alignprop_jax.evaluation.standardization import standardize_parts
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.loading.buckets import local_copy
from alignprop_jax.lora.adapters import factors_of_network
from alignprop_jax.lora.mixing import BASE_MODEL, LoraMix, define_flags_of_loras
from alignprop_jax.records import exhaustion
from alignprop_jax.records.images import columns_for, make_grid
from alignprop_jax.records.lock import locked
from alignprop_jax.records.metrics import write_json
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.rewards.base import Scorer
from alignprop_jax.runs.experiment import load_experiment, load_reward
from alignprop_jax.runs.same_run import has_scale_of, refuse_another_model
from alignprop_jax.runs.settings import at_a_time


def evaluate(
    config: ConfigDict,
    path: epath.PathLike,
    *loras: LoraMix,
    rewards: Sequence[str] = (),
    scorers: dict[str, Scorer] | None = None,
) -> dict[str, Any]:
    """Evaluates every split by the reward and by `scorers`, the judges beside the model by default.

    Args:
      loras: each is evaluated; one without files is that which training left in the workdir.
      rewards: names of further rewards to score by.

    Returns:
      What evaluation.json holds: which LoRA, and by split the number of samples n and of every
      score NAME_mean, NAME_std and NAME_ci95, the mean's 95% confidence interval by the bootstrap.
      Of several LoRAs, a list of these as "loras".

    Raises:
      UserError: the config, a file it names, the LoRA or the folder cannot be used; another process
        works in the folder, or it holds a run of another model; or the disk or the memory is full.
    """
    validate(config)
    enable_compilation_cache()
    workdir = Workdir(path)
    with locked(workdir.path), exhaustion.named(workdir.path, exhaustion.images_of(config)):
        return _evaluate(config, workdir, loras, rewards, scorers)


def _evaluate(
    config: ConfigDict,
    workdir: Workdir,
    loras: Sequence[LoraMix],
    rewards: Sequence[str],
    scorers: dict[str, Scorer] | None,
) -> dict[str, Any]:
    loras = tuple(lora if lora.files else LoraMix((find_lora(workdir),)) for lora in loras)
    shapes = adaptable_shapes(config.model)
    trees = [lora.load(shapes) for lora in loras]
    # The base model first: by its pictures rewards are scaled.
    experiment = load_experiment(config, loras=[None, *trees])
    refuse_another_model(workdir, config, experiment)
    factors = [factors_of_network(tree) for tree in trees]
    evaluator = standardize_parts(
        make_evaluator(config, experiment),
        workdir,
        factors[0],
        functools.partial(has_scale_of, workdir, config),
        keep=not workdir.has_run(),
    )
    if scorers is None:
        scorers = make_judges(config, experiment.prompts)
    scorers = scorers | {
        f"reward/{name}": reward_scorer(load_reward(config, name, experiment), experiment.prompts)
        for name in rewards
    }
    results = []
    for number, (lora, tree) in enumerate(zip(loras, factors, strict=True), start=1):
        result: dict[str, Any] = {"lora": str(lora)}
        for name, split in experiment.splits_of_loras[number].items():
            evaluation = evaluator.evaluate(tree, split, scorers, f"{name} prompts", lora.timesteps)
            grid = make_grid(evaluation.images, split.prompts, columns_for(len(split.prompts)))
            picture = f"{name}_evaluation" + (f"_{number}" if len(loras) > 1 else "")
            workdir.save_image(picture, grid)
            result[name] = summarize(evaluation) | confidence_intervals(evaluation)
        results.append(result)
    content = results[0] if len(results) == 1 else {"loras": results}
    write_json(workdir.path / "evaluation.json", content)
    return content


def find_lora(workdir: Workdir) -> str:
    """Returns the file that training left, or a copy from the bucket; UserError without one."""
    if not workdir.lora.exists():
        raise UserError(
            f"no LoRA in {workdir.lora}; train first, or give --lora=FILE or --lora={BASE_MODEL}"
        )
    return str(local_copy(workdir.lora))


def describe(results: dict[str, Any]) -> str:
    """Returns a table of every split's scores, for each LoRA."""
    if "loras" in results:
        return "\n\n".join(map(describe, results["loras"]))
    lines = [f"LoRA {results['lora']}"]
    for split, summary in results.items():
        if not isinstance(summary, dict):
            continue
        names = [key.removesuffix("_mean") for key in summary if key.endswith("_mean")]
        title = f"{split} prompts"
        width = max(map(len, [title, *names]))
        lines.append("")
        lines.append(
            f"{title:{width}} {'mean':>8}   {'95% interval':18}deviation, n={summary['n']}"
        )
        for name in names:
            low, high = summary.get(f"{name}_ci95", (math.nan, math.nan))
            mean, deviation = summary[f"{name}_mean"], summary[f"{name}_std"]
            interval = "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
            lines.append(f"{name:{width}} {mean:8.3f}   {interval:18}{deviation:8.3f}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    del argv
    use_cores(*at_a_time(_CONFIG.value))
    results = evaluate(_CONFIG.value, _WORKDIR.value, *_read_loras(), rewards=_REWARDS.value)
    print(describe(results))


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    _read_loras = define_flags_of_loras()
    _REWARDS = flags.DEFINE_list("rewards", [], "further rewards to score by, NAME,NAME,...")
    run_program(distributed.on_every_host(main))
