"""What a person sees of a run: evaluations, pictures and curves."""

import math

import numpy as np
from jaxtyping import PyTree

from alignprop_jax.devices.distributed import on_main
from alignprop_jax.evaluation.evaluator import Evaluation, Evaluator, summarize
from alignprop_jax.lora.adapters import Adaptation
from alignprop_jax.records.dashboards import Dashboard
from alignprop_jax.records.images import columns_for, make_comparison, make_grid
from alignprop_jax.records.workdir import Workdir
from alignprop_jax.rewards.base import Scorer
from alignprop_jax.runs.experiment import TRAIN, Split


class Reports:
    """Writes what an evaluator finds to the workdir and to every dashboard.

    All processes take part in the evaluation. The main one writes.
    """

    def __init__(
        self,
        workdir: Workdir,
        dashboards: list[Dashboard],
        evaluator: Evaluator,
        splits: dict[str, Split],
        adaptation: Adaptation,
        judges: dict[str, Scorer],
    ):
        self._workdir = workdir
        self._dashboards = dashboards
        self._evaluator = evaluator
        self._splits = splits
        self._adaptation = adaptation
        self._judges = judges

    def evaluate(self, step: int, lora: PyTree, when: str) -> dict[str, Evaluation]:
        """Evaluates every split and records it under the step; `when` names the pictures."""
        adapter = self._adaptation.bind(lora)
        evaluations = {}
        for name, split in self._splits.items():
            description = f"{name} prompts {when}"
            evaluation = self._evaluator.evaluate(adapter, split, self._judges, description)
            self._record(step, name, evaluation, f"{name}_{when}")
            evaluations[name] = evaluation
        return evaluations

    @on_main
    def _record(self, step: int, name: str, evaluation: Evaluation, picture: str) -> None:
        record = summarize(evaluation)
        self._workdir.evaluations.append({"step": step, "split": name, **record})
        means = {
            f"{name}/{key.removesuffix('_mean')}": value
            for key, value in record.items()
            if key.endswith("_mean")
        }
        self.scalars(step, means)
        columns = columns_for(len(evaluation.prompts))
        grid = make_grid(evaluation.images, evaluation.prompts, columns)
        self._picture(step, picture, name, grid)

    def load_before(self) -> dict[str, np.ndarray] | None:
        """The untrained model's images by split, if the workdir has them and their scores."""
        shape = self._evaluator.experiment.generator.sample_shape
        before = self._workdir.load_before(
            {name: (len(split.prompts), *shape) for name, split in self._splits.items()}
        )
        return None if self._workdir.lacks_evaluation(0, self._splits) else before

    @on_main
    def compare(self, step: int, evaluations: dict[str, Evaluation]) -> None:
        """Draws every prompt before training beside the same prompt and noise now."""
        for name, before in (self.load_before() or {}).items():
            evaluation = evaluations[name]
            grid = make_comparison(before, evaluation.images, evaluation.prompts)
            self._picture(step, f"{name}_before_after", f"{name}/before_after", grid)

    def preview(self, step: int, lora: PyTree) -> None:
        """Draws a batch of training prompts."""
        adapter = self._adaptation.bind(lora)
        images, prompts = self._evaluator.preview(adapter, self._splits[TRAIN])
        grid = make_grid(images, prompts, columns_for(len(prompts)))
        self._picture(step, f"preview_{step:06d}", "preview", grid)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to the curve of every name; what is not finite leaves a gap."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for dashboard in self._dashboards:
            dashboard.scalars(step, finite)

    def close(self) -> None:
        """Writes what the dashboards still hold."""
        for dashboard in self._dashboards:
            dashboard.close()

    def _picture(self, step, file_name, curve, grid):
        self._workdir.save_image(file_name, grid)
        for dashboard in self._dashboards:
            dashboard.image(step, curve, grid)
