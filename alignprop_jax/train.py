"""Tunes LoRA factors of a text-to-image model to a reward.

    python -m alignprop_jax.train --config=configs/emoji.py:aesthetic --workdir=runs/aesthetic

The same command on the same folder resumes a run, to the same numbers as if it had never stopped.
On a pod it is given to every host (docs/multihost.md), and the folder may be gs://BUCKET/FOLDER.
"""

import contextlib
import time

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from alignprop_jax.algorithms.state import TrainState
from alignprop_jax.config import define_config_flag, validate
from alignprop_jax.devices import distributed, sharding
from alignprop_jax.devices.compilation import enable_compilation_cache
from alignprop_jax.devices.cpu_devices import use_cores
from alignprop_jax.errors import UserError, note, run_program
from alignprop_jax.evaluation.evaluator import Evaluator, images_of, make_evaluator, make_judges
from alignprop_jax.evaluation.reports import Reports
from alignprop_jax.evaluation.standardization import standardize_parts
from alignprop_jax.generators.stable_diffusion.load import adaptable_shapes
from alignprop_jax.lora.factors import count_parameters
from alignprop_jax.lora.files import continue_lora
from alignprop_jax.process import signals
from alignprop_jax.records import exhaustion
from alignprop_jax.records.checkpoints import Checkpoints, make_fingerprint
from alignprop_jax.records.dashboards import open_dashboards
from alignprop_jax.records.lock import locked
from alignprop_jax.records.metrics import Record
from alignprop_jax.records.progress import progress_bar
from alignprop_jax.records.summary import describe_result, seconds_of_steps, summarize
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.runs.experiment import TRAIN, UNSEEN, Experiment, load_experiment
from alignprop_jax.runs.frozen_text import load_frozen_text
from alignprop_jax.runs.gradient_watch import GradientWatch, count_rest
from alignprop_jax.runs.same_run import (
    changes_of_run,
    contents_of_files,
    contents_of_weights,
    refuse_another_run,
)
from alignprop_jax.runs.settings import adaptation_of, at_a_time
from alignprop_jax.runs.train_step import CompiledStep, compile_train_step, create_state
from alignprop_jax.runs.trained_weights import save_trained

_RECORDED = ("reward_mean", "reward_std", "loss", "grad_norm", "step_seconds", "start_step")


def train(config: ConfigDict, path: epath.PathLike) -> None:
    """Runs or resumes the run of `config` in the folder `path`.

    Raises:
      UserError: the config, a file it names or the folder cannot be used; another process works in
        the folder, or it holds the run of another config; a sample is NaN or infinite; the gradient
        is so that nothing is trained, see `GradientWatch`; or the disk or the memory is full.
      SystemExit: a program that handles signals was sent one while it trained, and the run can be
        resumed from a checkpoint of the step that it was at.
    """
    began = time.perf_counter()
    validate(config)
    enable_compilation_cache()
    workdir = Workdir(path)
    named = exhaustion.named(workdir.path, exhaustion.images_of(config), config.remat)
    with locked(workdir.path), named:
        _train(config, workdir, began)


def _train(config: ConfigDict, workdir: Workdir, began: float) -> None:
    files = contents_of_files(config)
    refuse_another_run(workdir, config, files)
    summary = distributed.from_main(workdir.load_summary())
    if summary and summary["steps"] >= config.train.num_steps:
        print(f"already finished: {describe_result(workdir)}")
        return
    text = load_frozen_text(config, workdir)
    evaluator = make_evaluator(config, load_experiment(config, loras=[text]))
    experiment = evaluator.experiment
    contents = files | contents_of_weights(experiment)
    refuse_another_run(workdir, config, contents)
    state = create_state(config, experiment)
    with contextlib.closing(open_checkpoints(config, workdir, experiment, state)) as checkpoints:
        resumed = distributed.from_main(checkpoints.latest_step) is not None
        if resumed:
            state = checkpoints.restore(state)
        elif summary:
            raise UserError(
                f"the run in {workdir.path} is finished after {summary['steps']} steps and has no "
                "checkpoint to go on from; give another --workdir"
            )
        elif config.lora.init:
            state = start_from_file(config, experiment, state)
        first_step = int(state.step)
        if first_step > config.train.num_steps:
            raise UserError(
                f"the run in {workdir.path} is at step {first_step} already; "
                f"config.train.num_steps={config.train.num_steps} must be at least that"
            )
        announce(config, experiment, state)
        if resumed:
            checkpoints.remove_old()
            for key, (was, now) in changes_of_run(workdir, config).items():
                print(f"changed since this run began: {key}: {was} -> {now}")
        elif workdir.metrics.read():
            print(f"no checkpoint in {workdir.checkpoints} yet: the run begins anew")
        workdir.rewind(first_step if resumed else -1)
        workdir.save_config(config, contents)
        evaluator = standardize_parts(evaluator, workdir, adaptation_of(config).bind(state.lora))
        experiment = evaluator.experiment
        with contextlib.closing(open_reports(config, workdir, evaluator, first_step)) as reports:
            train_step, seconds_compile = compile_train_step(config, experiment, state)
            if resumed:
                repair_evaluations(config, experiment, state, workdir, reports)
            else:
                workdir.save_before(images_of(reports.evaluate(0, state.lora, "before")))
            state = run_steps(config, train_step, state, workdir, reports, checkpoints)
            save_trained(config, experiment, state, workdir, text)
            evaluate_after(int(state.step), state, workdir, reports)
    if distributed.is_main():
        seconds_earlier = sum(seconds_of_steps(workdir)[:first_step])
        seconds_total = time.perf_counter() - began + seconds_earlier
        workdir.save_summary(summarize(config, workdir, seconds_compile, seconds_total))
        print(describe_result(workdir))


def repair_evaluations(
    config: ConfigDict,
    experiment: Experiment,
    state: TrainState,
    workdir: Workdir,
    reports: Reports,
) -> None:
    """Evaluates again what a resumed run should have on record and has not.

    That is the untrained model, whose factors and noise follow from the seed, and the step that it
    goes on from.
    """
    step, num_steps = int(state.step), config.train.num_steps
    lacking = {0} if reports.load_before() is None else set()
    if is_due(step, config.evaluation.every) and step < num_steps:
        lacking |= {step} if workdir.lacks_evaluation(step, experiment.splits) else set()
    lacking = distributed.from_main(sorted(lacking))
    if not lacking:
        return
    note(f"evaluations of step {' and '.join(map(str, lacking))} are missing and are done again")
    workdir.evaluations.keep(lambda record: record["step"] not in lacking)
    if 0 in lacking:
        fresh = create_state(config, experiment)
        if config.lora.init:
            fresh = start_from_file(config, experiment, fresh)
        workdir.save_before(images_of(reports.evaluate(0, fresh.lora, "before")))
    if step in lacking:
        reports.evaluate(step, state.lora, f"{step:06d}")
    workdir.order_evaluations()


def start_from_file(config: ConfigDict, experiment: Experiment, state: TrainState) -> TrainState:
    """Returns the state before the first step, with the factors of `config.lora.init`.

    A run that is resumed has no more need of that file, unless it has lost what it began with.
    """
    scale = config.lora.alpha / config.lora.rank
    shapes = adaptable_shapes(config.model)
    lora = continue_lora(config.lora.init, state.lora, shapes, scale)
    return state.replace(lora=sharding.put(lora, sharding.replicated(experiment.mesh)))


def open_checkpoints(
    config: ConfigDict, workdir: Workdir, experiment: Experiment, state: TrainState
) -> Checkpoints:
    """Opens the run's checkpoints; UserError when they are of another model or LoRA."""
    fingerprint = make_fingerprint(
        config.model,
        config.dtype,
        experiment.generator.weights_that_tell(experiment.params),
        state.lora,
        config.lora.alpha,
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
        adaptation=adaptation_of(config),
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


def run_steps(
    config: ConfigDict,
    train_step: CompiledStep,
    state: TrainState,
    workdir: Workdir,
    reports: Reports,
    checkpoints: Checkpoints,
) -> TrainState:
    """Trains from the state's step to the last, recording, evaluating and checkpointing.

    Returns the state after the last step, which is in a whole checkpoint.

    Raises:
      UserError: the gradient is so that nothing is trained, or a sample of an evaluation is NaN.
      SystemExit: a signal came, to any of the processes; all of them end after the same step.
    """
    first_step, num_steps = int(state.step), config.train.num_steps
    rest = distributed.from_main(count_rest(config, workdir.metrics.read()))
    watch = GradientWatch(config, rest)
    bar = progress_bar(num_steps, "training", "step", initial=first_step)
    with bar as progress, signals.deferred() as signal_received:
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
            signal = distributed.largest(signal_received())
            if due or candidate or signal or step == num_steps:
                checkpoints.save(step, state, reward)
            if signal:
                checkpoints.wait()
                print(f"stopped after step {step}; the same command resumes the run")
                signals.exit_by(signal)
        # From here on a signal ends the run at once.
        checkpoints.wait()
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
    use_cores(*at_a_time(_CONFIG.value))
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    run_program(distributed.on_every_host(main))
