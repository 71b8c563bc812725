"""What is timed: one kind of update, or sampling, on one model."""

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Callable

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


def time_repeats(work: Work, repeat: Callable[[], object], began: float) -> dict:
    """Does the work once untimed and then `work.repeats` times.

    Args:
        repeat: does it once, and returns when it is done.
        began: when the process began to prepare, by `time.perf_counter`.

    Returns:
        The "seconds" of each time, "seconds_before" the first, and the process's "peak_rss_gb".
    """
    repeat()
    seconds_before = time.perf_counter() - began
    seconds = []
    for _ in range(work.repeats):
        start = time.perf_counter()
        repeat()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": seconds, "seconds_before": seconds_before, "peak_rss_gb": peak}


def parse_work() -> Work:
    """The work that a process was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=json.loads)
    return Work(**parser.parse_args().work)
