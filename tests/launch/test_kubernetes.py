"""The manifests, against the schemas of Kubernetes and of JobSet, which refuse a field that they do not know."""

import json
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from swift.config.launch import LaunchConfig
from swift.config.options import build
from swift.errors import ConfigError
from swift.launch.kubernetes import launch_kubernetes, manifests

DEFINITIONS = json.loads(Path(__file__).with_name("kubernetes_schemas.json").read_text())["definitions"]
KINDS = {
    ("batch/v1", "Job"): "io.k8s.api.batch.v1.Job",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): "jobset.x-k8s.io.v1alpha2.JobSet",
}


def config(**options):
    return build(
        LaunchConfig, ("argument", {"k8s": True, "image": "r/swift:1", "command": ["sft", "--system", "costs $5 $(X)"], **options})
    )


def check(manifest):
    name = KINDS[manifest["apiVersion"], manifest["kind"]]
    jsonschema_rs.validator_for({"definitions": DEFINITIONS, "$ref": f"#/definitions/{name}"}).validate(manifest)


def words(pod):
    return pod["containers"][0]["command"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nodes": 4, "gpus_per_node": 8, "kueue": "gpus", "namespace": "team", "max_restarts": 2},
        {"nodes": 2, "gpus_per_node": 0, "volume_claim": "data", "hang_timeout": 60},
        {"nodes": 4, "gpus_per_node": 8, "jobset": True, "max_restarts": 2, "kueue": "gpus", "volume_claim": "data"},
        {"gpus_per_node": 2, "cpus_per_gpu": 6, "memory": "96G"},
    ],
)
def test_manifests_are_what_kubernetes_takes(options, capsys):
    text = launch_kubernetes(config(**options))
    assert capsys.readouterr().out == text
    found = list(yaml.safe_load_all(text))
    assert found == manifests(config(**options))
    for manifest in found:
        check(manifest)


def test_the_schemas_refuse_a_field_that_is_misspelt():
    job = manifests(config())[0]
    job["spec"]["backofLimit"] = 1
    with pytest.raises(jsonschema_rs.ValidationError, match="backofLimit"):
        check(job)


def test_each_pod_is_a_machine_that_meets_the_others_at_the_first():
    service, job = manifests(config(nodes=4, gpus_per_node=8, kueue="gpus"))
    assert service["spec"]["clusterIP"] == "None"
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 4, 4)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert job["spec"]["suspend"] is True
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]  # so that swift-sft-0.swift-sft is the first pod
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    # $$ and $$( are a dollar to Kubernetes, which fills in $(JOB_COMPLETION_INDEX)
    assert words(pod) == [
        *["swift", "launch", "--nproc_per_node=8", "--nnodes=4", "--node_rank=$(JOB_COMPLETION_INDEX)"],
        *["--master_addr=swift-sft-0.swift-sft", "--master_port=29500", "--", "sft", "--system", "costs $$5 $$(X)"],
    ]


def test_megatron_is_passed_on_in_its_own_words():
    command = ["megatron", "sft", "--load", "m", "--micro_batch_size", "1"]
    job = manifests(config(command=command))[0]
    assert job["metadata"]["name"] == "swift-megatron-sft"
    assert words(job["spec"]["template"]["spec"]) == ["swift", "launch", "--nproc_per_node=1", "--", *command]
    check(job)


def test_cores_and_memory_are_asked_for():
    def resources(**options):
        return manifests(config(**options))[0]["spec"]["template"]["spec"]["containers"][0]["resources"]

    whole = {"requests": {"cpu": 12, "memory": "96Gi"}, "limits": {"nvidia.com/gpu": 2, "memory": "96Gi"}}
    assert resources(gpus_per_node=2, cpus_per_gpu=6, memory="96G") == whole
    assert resources(gpus_per_node=0, cpus_per_gpu=6) == {"requests": {"cpu": 6}}


def test_wrong_input_is_not_run_again_by_the_cluster():
    job = manifests(config(max_restarts=3, nodes=2))[1]
    assert job["spec"]["backoffLimit"] == 6
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # which a podFailurePolicy needs


def test_pods_of_a_jobset_have_its_names():
    jobset = manifests(config(nodes=2, jobset=True))[0]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "--master_addr=swift-sft-node-0-0.swift-sft" in words(pod)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "--k8s needs an image"),
        ({"job_name": "Run_1"}, "--job_name 'Run_1' is not a name that Kubernetes takes"),
        ({"job_name": "x" * 60}, "--job_name 'xxx"),
        ({"partition": "gpu"}, "--partition has no effect with --k8s"),
        ({"slurm": True}, "--slurm and --k8s exclude each other"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.message.startswith(message)
