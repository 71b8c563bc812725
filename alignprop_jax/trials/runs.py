"""The runs of a comparison: what each is, and where it lies."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from alignprop_jax.errors import UserError
from alignprop_jax.process.children import run_child
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.runs.same_run import (
    NOT_MEASURED,
    contents_of_files,
    refuse_another_run,
)
from alignprop_jax.trials.methods import Method


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every run may use.

    Attributes:
        queries: images that the reward scores in training.
        evaluations: how often a run is evaluated after its beginning.
        samples_per_prompt: of an evaluation at most; None for what the variant has.
    """

    queries: int
    evaluations: int
    samples_per_prompt: int | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """One method with one seed on one reward.

    Attributes:
        reward: the variant of the config file.
        path: its workdir.
        config: resolved and validated.
        command: that trains it, or goes on with it.
    """

    reward: str
    method: Method
    seed: int
    path: Path
    config: ConfigDict
    command: tuple[str, ...]

    @property
    def queries_per_step(self) -> int:
        """Images that the reward scores in an update."""
        return self.config.train.batch_size * (1 + self.config.gradient.renoise)

    def is_finished(self) -> bool:
        """Whether the run has come to its end, with as many steps as it is to have."""
        if not self.path.exists():
            return False
        summary = Workdir(self.path).load_summary()
        return summary is not None and summary["steps"] == self.config.train.num_steps

    def check(self) -> None:
        """Raises UserError where the folder holds a run of other settings than are planned."""
        if self.path.exists():
            contents = contents_of_files(self.config)
            refuse_another_run(
                Workdir(self.path), self.config, contents, lambda key: key not in NOT_MEASURED
            )

    def train(self) -> None:
        """Runs or resumes it, in a process of its own: its memory is its own, too.

        Raises:
            UserError: it failed; what it printed is in train.log beside it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        log = self.path / "train.log"
        with log.open("a") as output:
            code = run_child(self.command, stdout=output, stderr=output).returncode
        if code or not self.is_finished():
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"the run in {self.path} stopped: {''.join(last)}; see {log}")


def plan_runs(
    workdir: Path,
    config_file: str,
    rewards: Sequence[str],
    methods: Sequence[Method],
    seeds: int,
    budget: Budget,
) -> list[Run]:
    """The runs, all methods with the first seed before any with the second.

    Args:
        config_file: whose variants the rewards are.

    Raises:
        UserError: a method cannot have a reward, or the budget is below one update.
    """
    runs = []
    for seed, reward, method in itertools.product(range(seeds), rewards, methods):
        spec = f"{config_file}:{reward}"
        settings = {"train.seed": seed, "logging.tensorboard": False, "logging.image_every": 0}
        config = method.config(spec, settings)
        samples = config.evaluation.samples_per_prompt
        settings["evaluation.samples_per_prompt"] = min(
            samples, budget.samples_per_prompt or samples
        )
        queries = config.train.batch_size * (1 + config.gradient.renoise)
        num_steps = budget.queries // queries
        if not num_steps:
            raise UserError(
                f"--queries={budget.queries} is less than one update of {method.name!r}, {queries}"
            )
        every = max(1, num_steps // budget.evaluations)
        settings |= {
            "train.num_steps": num_steps,
            "evaluation.every": every,
            "checkpoint.every": every,
        }
        path = workdir / "runs" / reward / method.folder / f"seed_{seed}"
        overrides = [("algorithm", method.algorithm), *settings.items(), *method.settings]
        command = (sys.executable, "-m", "alignprop_jax.train", f"--config={spec}")
        command += (f"--workdir={path}", *(f"--config.{key}={value}" for key, value in overrides))
        runs.append(Run(reward, method, seed, path, method.config(spec, settings), command))
    return runs
