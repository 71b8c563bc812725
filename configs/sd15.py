"""Tunes Stable Diffusion 1.5 at 512 x 512, as AlignProp (arXiv 2310.03739) does.

    python -m alignprop_jax.train --config=configs/sd15.py:aesthetic --workdir=runs/sd15_aesthetic

A variant is a reward: aesthetic, hps, clip_score, pickscore, jpeg_compress, jpeg_incompress, count
or remove; alone for the report's method, or followed by what differs from it:

_k1, _k10: only the last step, or the last ten, are trained.
_full: all of them, which collapses to one image within two epochs, says the paper.
_paper_code: the code of the paper's time, which drew the cut-off anew at every step.
_repository: the code as released: cut-off about step 42, eta 1, guidance 5, weaker regularization.
_trl: as TRL 0.23 has it.

aesthetic trains on 45 animals. The paper reports that LAION's score goes from 5.73 to 8.94 on them
and from 5.64 to 8.71 on 6 others.
hps: give --config.prompts and --config.eval_prompts, one prompt a line; the paper's, HPSv2's, go
from 0.274 to 0.330, with 0.291 for _k1 and 0.314 for _k10.

A chip takes train.microbatch_size / chips images at a time: 16 are for a host of 4 to 16 chips.
"""

from ml_collections import ConfigDict

from alignprop_jax.runs.recipes import full_size_config


def get_config(variant: str = "aesthetic") -> ConfigDict:
    """Returns the config of a variant; UserError for an unknown one."""
    return full_size_config("stable-diffusion-v1-5/stable-diffusion-v1-5", variant)
