"""Times this package: python -m alignprop_jax.timing.own WORK; prints a line of JSON."""

import json
import tempfile
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from alignprop_jax.config import default_config, validate
from alignprop_jax.devices.compilation import enable_compilation_cache
from alignprop_jax.devices.cpu_devices import use_cores
from alignprop_jax.evaluation.evaluator import make_evaluator
from alignprop_jax.runs.experiment import TRAIN, load_experiment
from alignprop_jax.runs.settings import at_a_time
from alignprop_jax.runs.train_step import compile_train_step, create_state
from alignprop_jax.timing import redness
from alignprop_jax.timing.work import PROMPTS, Work, parse_work, time_repeats


def config_of(work: Work, prompts: Path) -> ConfigDict:
    """The config that does the work."""
    config = default_config()
    config.model = work.model
    config.prompts = config.eval_prompts = str(prompts)
    config.reward = f"{redness.__file__}:redness"
    config.loss.shape = "negative"
    config.sampler.num_steps = work.num_steps
    config.sampler.guidance_scale = work.guidance_scale
    config.sampler.height = config.sampler.width = work.edge
    config.lora.rank, config.lora.alpha = work.rank, float(work.rank)
    config.truncation.strategy = "fixed"
    config.truncation.start = work.start or 0
    config.truncation.max = work.num_steps - 1
    config.train.batch_size = work.batch_size
    config.evaluation.samples_per_prompt = -(-work.batch_size // len(PROMPTS))
    validate(config)
    return config


def time_work(work: Work) -> dict[str, float | list[float]]:
    """Seconds of each time, seconds before the first, and the peak memory in GB."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        config = config_of(work, prompts)
        use_cores(*at_a_time(config))
        enable_compilation_cache()
        experiment = load_experiment(config)
    if work.start is None:
        evaluator = make_evaluator(config, experiment)

        def repeat():
            evaluator.evaluate(None, experiment.splits[TRAIN], limit=work.batch_size)
    else:
        state = create_state(config, experiment)
        step, _ = compile_train_step(config, experiment, state)

        def repeat():
            nonlocal state
            state, metrics = step(state)
            jax.block_until_ready(metrics)

    return time_repeats(work, repeat, began)


if __name__ == "__main__":
    print(json.dumps(time_work(parse_work())))
