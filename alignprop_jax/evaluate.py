"""Scores a trained LoRA, or the base model, on the prompts of a config.

    python -m alignprop_jax.evaluate --config=configs/emoji.py:aesthetic --workdir=runs/aesthetic

Without --lora it takes the one that training left in the workdir; --lora=none is the base model,
--lora A --lora B --mix 0.3 takes 0.3 A + 0.7 B, and --lora_timesteps=1000:600 has it on in the
early steps alone. The samples have the prompts and the noise of the evaluations in training.
DIR/evaluation.json gets the scores, DIR/images the pictures.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from alignprop_jax import distributed
from alignprop_jax.buckets import in_bucket
from alignprop_jax.compilation import enable_compilation_cache
from alignprop_jax.config import define_config_flag, validate
from alignprop_jax.cpu_devices import use_cores
from alignprop_jax.errors import UserError, run_program
from alignprop_jax.evaluation import (
    confidence_intervals,
    make_evaluator,
    make_judges,
    summarize,
)
from alignprop_jax.experiment import load_experiment
from alignprop_jax.images import columns_for, make_grid
from alignprop_jax.judges import Scorer
from alignprop_jax.metrics import write_json
from alignprop_jax.mixing import BASE_MODEL, LoraMix, define_lora_flags
from alignprop_jax.standardization import standardize_parts
from alignprop_jax.workdir import Workdir


def evaluate(
    config: ConfigDict,
    path: epath.PathLike,
    lora: LoraMix,
    scorers: dict[str, Scorer] | None = None,
) -> dict[str, Any]:
    """Evaluates every split by the reward and by `scorers`, the judges beside the model by default.

    A `lora` without files is the one that training left in the workdir.

    Returns:
      What evaluation.json holds: which LoRA, and by split the number of samples n and of every
      score NAME_mean, NAME_std and NAME_ci95, the mean's 95% confidence interval by the bootstrap.

    Raises:
      UserError: the config, a file it names, the LoRA or the folder cannot be used.
    """
    validate(config)
    enable_compilation_cache()
    workdir = Workdir(path)
    if not lora.files:
        lora = LoraMix((find_lora(workdir),))
    experiment = load_experiment(config)
    factors = lora.load(experiment.params["unet"])
    evaluator = standardize_parts(make_evaluator(config, experiment), workdir)
    if scorers is None:
        scorers = make_judges(config)
    results: dict[str, Any] = {"lora": str(lora)}
    for name, split in experiment.splits.items():
        evaluation = evaluator.evaluate(factors, split, scorers, f"{name} prompts", lora.timesteps)
        columns = columns_for(len(split.prompts))
        workdir.save_image(
            f"{name}_evaluation", make_grid(evaluation.images, split.prompts, columns)
        )
        results[name] = summarize(evaluation) | confidence_intervals(evaluation)
    write_json(workdir.path / "evaluation.json", results)
    return results


def find_lora(workdir: Workdir) -> str:
    """Returns the file that training left, or a copy from the bucket; UserError without one."""
    if not workdir.lora.exists():
        raise UserError(
            f"no LoRA in {workdir.lora}; train first, or give --lora=FILE or --lora={BASE_MODEL}"
        )
    if not in_bucket(workdir.lora):
        return str(workdir.lora)
    local = Path(tempfile.mkdtemp()) / workdir.lora.name
    local.write_bytes(workdir.lora.read_bytes())
    return str(local)


def describe(results: dict[str, Any]) -> str:
    """Returns a table of every split's scores."""
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
    use_cores(_CONFIG.value)
    print(describe(evaluate(_CONFIG.value, _WORKDIR.value, _read_lora())))


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    _read_lora = define_lora_flags()
    run_program(distributed.on_every_host(main))
