"""What Kubernetes is told: an indexed Job with a headless Service, or a JobSet. Each machine is a pod with one swift launch."""

from typing import Any

from swift.config.launch import LaunchConfig

WORKSPACE = "/workspace"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"


def launch_kubernetes(config: LaunchConfig) -> str:
    """Print the manifest as YAML, for kubectl apply -f -; gives its text."""
    import yaml

    text = str(yaml.safe_dump_all(manifests(config), sort_keys=False, allow_unicode=True))
    print(text, end="")
    return text


def manifests(config: LaunchConfig) -> list[dict[str, Any]]:
    """The objects to create, in their order."""
    name = config.name
    job = job_spec(config)
    if config.jobset:
        # Pods are NAME-node-0-INDEX.NAME; JobSet makes the Service, and with one failed machine starts all again.
        spec: dict[str, Any] = {
            "failurePolicy": {"maxRestarts": config.max_restarts},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        }
        if config.kueue:
            spec["suspend"] = True
        return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _metadata(config, name, queue=True), "spec": spec}]
    if config.kueue:
        job["suspend"] = True  # Kueue lets it go when there is room
    service = {
        "clusterIP": "None",
        "selector": {"job-name": name},
        # The pods look for the first before it counts as ready.
        "publishNotReadyAddresses": True,
        "ports": [{"name": "rendezvous", "port": config.master_port}],
    }
    found: list[dict[str, Any]] = []
    if config.nodes > 1:
        found.append({"apiVersion": "v1", "kind": "Service", "metadata": _metadata(config, name), "spec": service})
    found.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(config, name, queue=True), "spec": job})
    return found


def job_spec(config: LaunchConfig) -> dict[str, Any]:
    """The spec of a Job (batch/v1) whose pods are the machines."""
    return {
        "completionMode": "Indexed",
        "completions": config.nodes,
        "parallelism": config.nodes,
        # A JobSet counts restarts itself.
        "backoffLimit": 0 if config.jobset else config.max_restarts * config.nodes,
        "podFailurePolicy": {
            "rules": [
                # Wrong input stays wrong; a machine that is drained or evicted is no failure of the run.
                {"action": "FailJob", "onExitCodes": {"containerName": "swift", "operator": "In", "values": [2]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"labels": {"app.kubernetes.io/name": config.name}}, "spec": pod_spec(config)},
    }


def pod_spec(config: LaunchConfig) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]  # NCCL and data loaders share more than the usual 64 MiB
    if config.volume_claim:
        volumes.append({"name": "workspace", "persistentVolumeClaim": {"claimName": config.volume_claim}})
        mounts.append({"name": "workspace", "mountPath": WORKSPACE})
    container: dict[str, Any] = {
        "name": "swift",
        "image": config.image,
        "command": command(config),
        "workingDir": WORKSPACE,
        "volumeMounts": mounts,
    }
    amounts = {"cpu": config.cpus, "memory": f"{config.memory}i" if config.memory else None}
    requests = {name: amount for name, amount in amounts.items() if amount}
    limits: dict[str, int | str] = {GPU: config.gpus_per_node} if config.gpus_per_node else {}
    limits |= {name: requests[name] for name in ("memory",) if name in requests}
    container |= {"resources": {name: some for name, some in (("requests", requests), ("limits", limits)) if some}}
    spec: dict[str, Any] = {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
    if not config.jobset and config.nodes > 1:
        spec["subdomain"] = config.name
    # The first Ctrl-C of a pod is SIGTERM: the step that is going on, and its checkpoint, take a while.
    spec["terminationGracePeriodSeconds"] = 120
    return spec


def command(config: LaunchConfig) -> list[str]:
    """The words of a pod. Kubernetes puts the index of the pod in the place of $(JOB_COMPLETION_INDEX), and $ in that of $$."""
    words = ["swift", "launch", f"--nproc_per_node={config.gpus_per_node or 1}"]
    if config.nodes > 1:
        first = f"{config.name}-node-0-0.{config.name}" if config.jobset else f"{config.name}-0.{config.name}"
        words += [f"--nnodes={config.nodes}", "--node_rank=$(JOB_COMPLETION_INDEX)"]
        words += [f"--master_addr={first}", f"--master_port={config.master_port}"]
    words += [f"--max_restarts={config.max_restarts}"] if config.max_restarts else []
    words += [f"--hang_timeout={config.hang_timeout:g}"] if config.given("hang_timeout") else []
    return [*words, "--", *(word.replace("$", "$$") for word in config.command)]


def _metadata(config: LaunchConfig, name: str, *, queue: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    if config.namespace:
        found["namespace"] = config.namespace
    if queue and config.kueue:
        found["labels"] = {QUEUE_LABEL: config.kueue}
    return found
