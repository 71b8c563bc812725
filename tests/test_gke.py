"""The GKE manifest asks for all chips of its slice, and its image has what the command needs."""

import math
from pathlib import Path

import pytest
import yaml

from configs import emoji

ROOT = Path(__file__).parent.parent
# Of a host of a slice of many: machine type ct5lp-hightpu-4t.
CHIPS_PER_HOST = {"tpu-v5-lite-podslice": 4}


@pytest.fixture(scope="module")
def manifest():
    (manifest,) = yaml.safe_load_all((ROOT / "launch/gke/jobset.yaml").read_text())
    return manifest


@pytest.fixture(scope="module")
def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    return replicated["template"]["spec"]


@pytest.fixture(scope="module")
def pod(job):
    return job["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (container,) = pod["containers"]
    return container


def chips(pod):
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    return math.prod(int(side) for side in topology.split("x"))


def test_one_pod_a_host_takes_all_chips_of_the_slice(job, pod, container):
    accelerator = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert per_host == CHIPS_PER_HOST[accelerator]
    assert job["parallelism"] == job["completions"] == chips(pod) // per_host
    assert chips(pod) % per_host == 0


def test_slice_is_one_node_pool_and_fails_and_restarts_as_one(manifest, job, pod):
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    placement = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert manifest["metadata"]["annotations"][placement] == "cloud.google.com/gke-nodepool"
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_command_trains_what_exists_into_a_bucket(pod, container):
    *program, config, workdir = container["command"]
    assert program == ["python", "-m", "alignprop_jax.train"]
    path, variant = config.removeprefix("--config=").split(":")
    assert ROOT / path == Path(emoji.__file__)
    assert emoji.get_config(variant).train.batch_size % chips(pod) == 0
    assert workdir.startswith("--workdir=gs://")


def test_secrets_are_no_text_of_the_manifest(container):
    assert [variable["name"] for variable in container["env"]] == ["HF_TOKEN", "WANDB_API_KEY"]
    for variable in container["env"]:
        assert set(variable) == {"name", "valueFrom"}
        assert variable["valueFrom"]["secretKeyRef"]["optional"] is True


def test_image_has_the_checkout_without_history_environment_and_runs():
    ignored = (ROOT / "launch/gke/Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    assert not {"configs", "alignprop_jax", "setup.py", "README.md"} & set(ignored)
