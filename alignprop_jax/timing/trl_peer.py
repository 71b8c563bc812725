"""Times TRL's AlignPropTrainer (0.23, the last release that has it) and diffusers, on CPU.

Run as a file, with `work.py` beside it, by an interpreter that has them: PYTHON trl_peer.py WORK.
Prints a line of JSON, as `own` does.
"""

import itertools
import json
import tempfile
import time

import accelerate
import torch
from work import PROMPTS, Work, parse_work, time_repeats

accelerate.PartialState(cpu=True)


def make_update(work: Work):
    """A function that makes one update."""
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    prompts = itertools.cycle(PROMPTS)
    config = AlignPropConfig(
        num_epochs=1,
        train_batch_size=work.batch_size,
        train_gradient_accumulation_steps=1,
        train_learning_rate=1e-3,
        sample_num_steps=work.num_steps,
        sample_guidance_scale=work.guidance_scale,
        sample_eta=0.0,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=work.start,
        mixed_precision="no",
        allow_tf32=False,
        log_with=None,
        save_freq=10**6,
        project_kwargs={"project_dir": tempfile.mkdtemp(), "automatic_checkpoint_naming": True},
    )
    trainer = AlignPropTrainer(
        config,
        lambda images, prompts, _: (images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2)), {}),
        lambda: (next(prompts), {}),
        DefaultDDPOStableDiffusionPipeline(work.model, use_lora=True),
    )
    epochs = itertools.count()
    return lambda: trainer.step(0, next(epochs))


def make_sample(work: Work):
    """A function that samples a batch."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(work.model)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(itertools.islice(itertools.cycle(PROMPTS), work.batch_size))
    settings = {"num_inference_steps": work.num_steps, "guidance_scale": work.guidance_scale}
    return lambda: pipeline(prompts, output_type="np", **settings)


def main() -> None:
    work = parse_work()
    torch.manual_seed(0)
    began = time.perf_counter()
    repeat = make_sample(work) if work.start is None else make_update(work)
    print(json.dumps(time_repeats(work, repeat, began)))


if __name__ == "__main__":
    main()
