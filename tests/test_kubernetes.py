"""The manifests of launch/kubernetes, against the schemas that their projects publish."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kubeflow.training.api_client import ApiClient
from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import (
    IoK8sApiCoreV1PodTemplateSpec,
)
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from dr2dist.config import load_config
from dr2dist.training.main import main

FOLDER = Path(__file__).parent.parent / "launch" / "kubernetes"
GRACE = 60
"""train.grace by default."""


def manifest(name: str) -> dict[str, Any]:
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(found, dict)
    return found


def check_pods(template: dict[str, Any]) -> None:
    """What is left out in reading it is not in the schema."""
    read = IoK8sApiCoreV1PodTemplateSpec.from_dict(template)
    assert read is not None and read.to_dict() == template
    assert template["spec"]["terminationGracePeriodSeconds"] > GRACE
    (container,) = template["spec"]["containers"]
    (variable,) = container["env"]  # before it kills ranks
    assert variable["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    assert GRACE < float(variable["value"]) < template["spec"]["terminationGracePeriodSeconds"]
    line = container["command"]
    assert line[0] == "torchrun" and line[-4:-2] == ["--module", main.__module__]
    assert line[-2:] == ["--config", "/work/run.yaml"]


def test_the_job_set() -> None:
    found = manifest("jobset")
    read = JobsetV1alpha2JobSet.from_dict(found)
    assert read is not None and read.to_dict() == found
    (job,) = found["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    check_pods(pods["template"])
    line = pods["template"]["spec"]["containers"][0]["command"]
    assert f"--nnodes={pods['completions']}" in line and pods["parallelism"] == pods["completions"]
    # The first pod's name: JobSet, replicated job, its number, the pod's; then the service.
    name = found["metadata"]["name"]
    assert f"--master-addr={name}-{job['name']}-0-0.{name}" in line


def test_the_pytorch_job() -> None:
    found = manifest("pytorchjob")
    client = ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(found)), "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(read) == found
    replicas = found["spec"]["pytorchReplicaSpecs"]
    # The operator tells torchrun how many nodes there are and where, if one is the master.
    assert {kind: each["replicas"] for kind, each in replicas.items()} == {"Master": 1, "Worker": 1}
    for each in replicas.values():
        assert each["restartPolicy"] == "OnFailure"
        check_pods(each["template"])
        assert each["template"]["spec"]["containers"][0]["name"] == "pytorch"  # its word


@pytest.mark.parametrize("where", ["spec", "metadata"])
def test_a_word_that_is_in_no_schema_is_found(where: str) -> None:
    found = manifest("jobset")
    found[where]["replicas_"] = 1
    read = JobsetV1alpha2JobSet.from_dict(found)
    assert read is not None and read.to_dict() != found


def test_the_grace_of_pods_covers_that_of_runs() -> None:
    path = Path(__file__).parent.parent / "configs" / "finetune.yaml"
    assert load_config(path, ["model.weights=random"]).train.grace == GRACE
