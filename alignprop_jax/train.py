"""Tunes LoRA factors of a text-to-image model to a reward.

    python -m alignprop_jax.train --config=configs/emoji.py:aesthetic --workdir=runs/aesthetic

The same command on the same folder resumes a run, to the same numbers as if it had never stopped.
On a pod it is given to every host (docs/multihost.md), and the folder may be gs://BUCKET/FOLDER.
"""

import contextlib
import functools
import time
from collections.abc import Callable

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.checkpoints import Checkpoints, make_fingerprint
from alignprop_jax.config import define_config_flag, lora_scale, validate
from alignprop_jax.devices import distributed, sharding
from alignprop_jax.devices.compilation import (
    compiler_options,
    enable_compilation_cache,
    garbage_collection_paused,
    release_freed_memory,
)
from alignprop_jax.devices.cpu_devices import use_cores
from alignprop_jax.errors import UserError, run_program
from alignprop_jax.evaluation.evaluator import Evaluator, make_evaluator, make_judges
from alignprop_jax.evaluation.standardization import standardize_parts
from alignprop_jax.experiment import TRAIN, UNSEEN, Experiment, load_experiment
from alignprop_jax.gradient_watch import GradientWatch, count_rest
from alignprop_jax.lora.factors import count_parameters
from alignprop_jax.lora.files import continue_lora
from alignprop_jax.records.dashboards import open_dashboards
from alignprop_jax.records.metrics import Record
from alignprop_jax.records.progress import progress_bar
from alignprop_jax.records.reports import Reports
from alignprop_jax.records.summary import describe_result, seconds_of_steps, summarize
from alignprop_jax.records.trained_weights import save_trained
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.train_steps import create_state, frozen_arguments, trace_train_step

_RECORDED = ("reward_mean", "reward_std", "loss", "grad_norm", "step_seconds", "start_step")

TrainStep = Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]


def train(config: ConfigDict, path: epath.PathLike) -> None:
    """Runs or resumes the run of `config` in the folder `path`.

    After SIGTERM it makes a checkpoint at the next step and returns.

    Raises:
      UserError: the config, a file it names or the folder cannot be used; a sample is NaN or
        infinite; or the gradient is so that nothing is trained, see `GradientWatch`.
    """
    began = time.perf_counter()
    validate(config)
    enable_compilation_cache()
    workdir = Workdir(path)
    evaluator = make_evaluator(config, load_experiment(config))
    experiment = evaluator.experiment
    state = create_state(config, experiment)
    with contextlib.closing(open_checkpoints(config, workdir, experiment, state)) as checkpoints:
        resumed = distributed.from_main(checkpoints.latest_step) is not None
        if resumed:
            state = checkpoints.restore(state)
        elif config.lora.init:
            state = start_from_file(config, experiment, state)
        first_step = int(state.step)
        finished = distributed.from_main(workdir.load_summary() is not None)
        if first_step >= config.train.num_steps and finished:
            print(f"already finished: {describe_result(workdir)}")
            return
        if first_step > config.train.num_steps:
            raise UserError(
                f"the run in {path} is at step {first_step} already; "
                f"config.train.num_steps={config.train.num_steps} must be at least that"
            )
        announce(config, experiment, state)
        workdir.rewind(first_step if resumed else -1)
        for change in workdir.save_config(config):
            print(f"changed since this run began: {change}")
        evaluator = standardize_parts(evaluator, workdir, state.lora)
        experiment = evaluator.experiment
        with contextlib.closing(open_reports(config, workdir, evaluator, first_step)) as reports:
            train_step, seconds_compile = compile_train_step(config, experiment, state)
            if not resumed:
                workdir.save_before(reports.evaluate(0, state.lora, "before"))
            state = run_steps(config, train_step, state, workdir, reports, checkpoints)
            if int(state.step) < config.train.num_steps:
                print(f"stopped after step {int(state.step)}; the same command resumes the run")
                return
            save_trained(config, experiment, state, workdir)
            evaluate_after(int(state.step), state, workdir, reports)
    if distributed.is_main():
        seconds_earlier = sum(seconds_of_steps(workdir)[:first_step])
        seconds_total = time.perf_counter() - began + seconds_earlier
        workdir.save_summary(summarize(config, workdir, seconds_compile, seconds_total))
        print(describe_result(workdir))


def start_from_file(config: ConfigDict, experiment: Experiment, state: TrainState) -> TrainState:
    """Returns the state before the first step, with the factors of `config.lora.init`.

    A run that is resumed has no more need of that file.
    """
    lora = continue_lora(
        config.lora.init, state.lora, experiment.params["unet"], lora_scale(config)
    )
    return state.replace(lora=sharding.put(lora, sharding.replicated(experiment.mesh)))


def open_checkpoints(
    config: ConfigDict, workdir: Workdir, experiment: Experiment, state: TrainState
) -> Checkpoints:
    """Opens the run's checkpoints; UserError when they are of another model or LoRA."""
    fingerprint = make_fingerprint(
        config.model, config.dtype, experiment.params["unet"], state.lora, config.lora.alpha
    )
    settings = config.checkpoint
    return Checkpoints(workdir.checkpoints, fingerprint, settings.keep, settings.keep_best)


def open_reports(
    config: ConfigDict, workdir: Workdir, evaluator: Evaluator, first_step: int
) -> Reports:
    """Opens the dashboards, and what evaluates for them."""
    dashboards = open_dashboards(
        workdir.path,
        config.to_dict(),
        first_step + 1 if first_step else 0,
        tensorboard=config.logging.tensorboard,
        wandb=config.logging.wandb,
    )
    return Reports(
        workdir,
        dashboards,
        evaluator,
        evaluator.experiment.splits,
        lora_scale=lora_scale(config),
        judges=make_judges(config, evaluator.experiment.prompts),
    )


def announce(config: ConfigDict, experiment: Experiment, state: TrainState) -> None:
    """Prints what is about to be trained."""
    start = f", resumed after step {int(state.step)}" if int(state.step) else ""
    rank = config.lora.rank
    print(
        f"{config.model}: {f'LoRA of rank {rank}' if rank else 'all weights of the UNet'} with "
        f"{count_parameters(state.lora):,} parameters, reward {experiment.reward.name}, "
        f"{len(experiment.splits[TRAIN].prompts)} prompts, "
        f"{config.train.num_steps} steps of {config.train.batch_size} images "
        f"on {experiment.mesh.size} {jax.default_backend()} device(s){start}"
    )


def compile_train_step(
    config: ConfigDict, experiment: Experiment, state: TrainState
) -> tuple[TrainStep, float]:
    """Compiles one update; returns it with the seconds that took."""
    print("compiling the train step ...", end=" ", flush=True)
    began = time.perf_counter()
    with garbage_collection_paused():
        lowered = trace_train_step(config, experiment, state).lower()
    compiled = lowered.compile(compiler_options())
    release_freed_memory()
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s", flush=True)
    return functools.partial(compiled, *frozen_arguments(experiment)), seconds


def run_steps(
    config: ConfigDict,
    train_step: TrainStep,
    state: TrainState,
    workdir: Workdir,
    reports: Reports,
    checkpoints: Checkpoints,
) -> TrainState:
    """Trains from the state's step to the last, recording, evaluating and checkpointing.

    Returns the state after the last step, or after the one at which the machine was to be given up.

    Raises:
      UserError: the gradient is so that nothing is trained, or a sample of an evaluation is NaN.
    """
    first_step, num_steps = int(state.step), config.train.num_steps
    rest = distributed.from_main(count_rest(config, workdir.metrics.read()))
    watch = GradientWatch(config, rest)
    bar = progress_bar(num_steps, "training", "step", initial=first_step)
    with bar as progress, distributed.preemption_notice() as preempted:
        for step in range(first_step + 1, num_steps + 1):
            began = time.perf_counter()
            state, metrics = train_step(state)
            metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
            metrics["step_seconds"] = time.perf_counter() - began
            workdir.metrics.append({"step": step, **{name: metrics[name] for name in _RECORDED}})
            reports.scalars(step, {f"training/{name}": value for name, value in metrics.items()})
            progress.set_postfix_str(describe_step(metrics), refresh=False)
            progress.update()
            watch.look(step, metrics, checkpoints)
            if is_due(step, config.logging.image_every):
                reports.preview(step, state.lora)
            reward = None
            if is_due(step, config.evaluation.every) and step < num_steps:
                evaluations = reports.evaluate(step, state.lora, f"{step:06d}")
                reward = float(evaluations[UNSEEN].scores["reward"].mean())
            # While steps are skipped, the last good checkpoint is the one to come back to.
            due = is_due(step, config.checkpoint.every) and not metrics["skipped_in_a_row"]
            candidate = config.checkpoint.keep_best and reward is not None
            last = preempted(step) or step == num_steps
            if due or candidate or last:
                checkpoints.save(step, state, reward)
            if last:
                break
    return state


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens now."""
    return every > 0 and step % every == 0


def describe_step(metrics: Record) -> str:
    """Returns the end of the progress bar."""
    skipped = f", {metrics['skipped']} skipped" if metrics["skipped"] else ""
    return f"reward {metrics['reward_mean']:.3f}{skipped}"


def evaluate_after(step: int, state: TrainState, workdir: Workdir, reports: Reports) -> None:
    """Evaluates the trained LoRA and draws it beside the untrained model."""
    # A run that was killed at this point has evaluated the step already.
    workdir.evaluations.keep(lambda record: record["step"] < step)
    reports.compare(step, reports.evaluate(step, state.lora, "after"))


def main(argv: list[str]) -> None:
    del argv
    use_cores(_CONFIG.value)
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    run_program(distributed.on_every_host(main))
