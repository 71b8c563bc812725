"""What is timed: one kind of update, or sampling, on one model."""

import argparse
import dataclasses
import json

PROMPTS = ("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird")


@dataclasses.dataclass(frozen=True)
class Work:
    """A case.

    Attributes:
        model: a pipeline folder.
        start: the first denoising step with gradient; None for sampling alone.
        batch_size: images an update, or sampled at a time.
        num_steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        repeats: how often it is timed, after a first time that is not.
        edge: height and width of the images in pixels; 0 for those of the model.
        rank: of the LoRA.
    """

    model: str
    start: int | None
    batch_size: int
    num_steps: int
    guidance_scale: float
    repeats: int
    edge: int = 0
    rank: int = 4

    @property
    def name(self) -> str:
        """As in tables."""
        if self.start is None:
            return f"sample, {self.num_steps} steps"
        return f"update, start {self.start} of {self.num_steps}"

    def arguments(self) -> list[str]:
        """For a process that does it, as `parse_work` reads them."""
        return [json.dumps(dataclasses.asdict(self))]


def parse_work() -> Work:
    """The work that a process was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=json.loads)
    return Work(**parser.parse_args().work)
