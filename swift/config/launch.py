"""How a command is started in several processes: here, by Slurm, by Ray or on Kubernetes."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swift.config.options import Config, build, opt
from swift.errors import ConfigError

TRAINING = ("pt", "sft", "rlhf")  # the commands that several processes do together
MEGATRON = "megatron"  # its sft and pt: the same, in Megatron's option names
# ms-swift's way to start several processes: environment variables, each of which is an option of swift launch.
VARIABLES = {
    "NPROC_PER_NODE": "nproc_per_node",
    "NNODES": "nnodes",
    "NODE_RANK": "node_rank",
    "MASTER_ADDR": "master_addr",
    "MASTER_PORT": "master_port",
}
# What each way of starting reads, beside what all read.
_HERE = "nproc_per_node nnodes node_rank master_addr master_port rdzv_endpoint rdzv_id log_dir".split()
_READ = {
    "slurm": (
        "nodes gpus_per_node cpus_per_gpu memory partition account qos time job_name script submit log_dir hang_timeout master_port"
    ).split(),
    "ray": ["num_workers", "ray_address", "use_gpu", "log_dir"],
    "k8s": "nodes gpus_per_node cpus_per_gpu memory job_name image namespace kueue jobset volume_claim hang_timeout master_port".split(),
}
_EVERYWHERE = ("slurm", "ray", "k8s", "max_restarts", "command")


@dataclass(kw_only=True)
class LaunchConfig(Config):
    """Several processes."""

    nproc_per_node: int | None = opt(
        None, "processes on this machine; by default one for each accelerator. NPROC_PER_NODE says the same, as for ms-swift", minimum=1
    )
    nnodes: int = opt(1, "machines; swift launch is started on each (NNODES)", minimum=1)
    node_rank: int = opt(0, "which of the machines this one is, from 0 (NODE_RANK)", minimum=0)
    master_addr: str = opt("127.0.0.1", "address of machine 0 (MASTER_ADDR)")
    master_port: int = opt(
        29500, "port on which the processes find each other; one machine alone takes a free one", minimum=1, maximum=65535
    )
    rdzv_endpoint: str | None = opt(
        None, "HOST:PORT at which the machines meet, in the place of --master_addr and --master_port; they then number themselves"
    )
    rdzv_id: str = opt("swift", "name of the job at the meeting place")
    max_restarts: int = opt(
        0, "after a process was killed or hung: start all again so many times, each time from the newest checkpoint of the run", minimum=0
    )
    hang_timeout: float = opt(
        1800.0, "seconds without progress of any process after which the run is ended, with the stack of each; 0 watches nothing", minimum=0
    )
    log_dir: str | None = opt(None, "folder of what each process prints; by default OUTPUT_DIR/launch")
    slurm: bool = opt(False, "write a batch script for Slurm in the place of starting")
    ray: bool = opt(False, "start the processes as the workers of Ray Train")
    k8s: bool = opt(False, "print a Job for Kubernetes in the place of starting")
    nodes: int = opt(1, "slurm, k8s: machines", minimum=1)
    gpus_per_node: int = opt(
        1, "slurm, k8s: accelerators of each machine, with one process for each; 0: one process without any", minimum=0
    )
    cpus_per_gpu: int | None = opt(
        None,
        "slurm, k8s: cores for each process; Slurm gives one to a whole machine unless told, or unless its administrator says more",
        minimum=1,
    )
    memory: str | None = opt(None, "slurm, k8s: main memory of each machine, such as 256G")
    job_name: str | None = opt(None, "slurm, k8s: name of the job; by default swift-COMMAND")
    partition: str | None = opt(None, "slurm: partition")
    account: str | None = opt(None, "slurm: account that pays")
    qos: str | None = opt(None, "slurm: quality of service")
    time: str | None = opt(None, "slurm: longest time, such as 1-12:00:00; two minutes before its end the run is stopped and saved")
    script: str | None = opt(None, "slurm: file of the script; by default it is printed")
    submit: bool = opt(False, "slurm: give the script to sbatch")
    num_workers: int = opt(1, "ray: processes", minimum=1)
    ray_address: str | None = opt(None, "ray: address of the cluster; by default RAY_ADDRESS, or one on this machine")
    use_gpu: bool | None = opt(None, "ray: an accelerator for each process; by default if this machine has one")
    image: str | None = opt(None, "k8s: image with this package in it")
    namespace: str | None = opt(None, "k8s: namespace")
    kueue: str | None = opt(None, "k8s: queue of Kueue that admits the job")
    jobset: bool = opt(False, "k8s: a JobSet in the place of a Job, so that a failed machine starts all again")
    volume_claim: str | None = opt(None, "k8s: PersistentVolumeClaim that is mounted at /workspace, where the command runs")
    command: list[str] = opt(
        [], "what is started, after --: sft, pt, rlhf, megatron sft or megatron pt with their options", positional=True
    )

    @property
    def way(self) -> str | None:
        """What starts the processes: slurm, ray, k8s, or None for this command itself."""
        return next(iter(self._ways()), None)

    def _ways(self) -> list[str]:
        return [name for name, is_chosen in (("slurm", self.slurm), ("ray", self.ray), ("k8s", self.k8s)) if is_chosen]

    @property
    def cpus(self) -> int | None:
        """Cores of each machine that Slurm or Kubernetes gives; None if it was not said."""
        return self.cpus_per_gpu and self.cpus_per_gpu * max(1, self.gpus_per_node)

    @property
    def name(self) -> str:
        words = self.command[: 2 if self.command[0] == MEGATRON else 1]
        return self.job_name or "-".join(["swift", *words])

    @property
    def world_size(self) -> int | None:
        """Processes of the run; None if this machine's accelerators will say."""
        if self.way == "ray":
            return self.num_workers
        if self.way is not None:
            return self.nodes * max(1, self.gpus_per_node)
        return self.nproc_per_node and self.nproc_per_node * self.nnodes

    def check(self) -> None:
        super().check()
        chosen = self._ways()
        if len(chosen) > 1:
            raise ConfigError(f"--{chosen[0]} and --{chosen[1]} exclude each other", hint="keep one")
        if not self.command:
            raise ConfigError("nothing to launch", hint="swift launch [OPTIONS] -- sft --model ...: what is started stands after --")
        if not is_training(self.command):
            raise ConfigError(
                f"swift {self.command[0]} is not done by several processes",
                hint=f"swift launch starts: {', '.join(TRAINING)}, {MEGATRON} sft, {MEGATRON} pt",
            )
        read = _READ[chosen[0]] if chosen else [*_HERE, "hang_timeout"]
        because = f"with --{chosen[0]}" if chosen else "without --slurm, --ray or --k8s"
        every = {name for names in _READ.values() for name in names} | set(_HERE)
        self.refuse_without_effect(sorted(every - set(read) - set(_EVERYWHERE)), because)
        if self.memory is not None and not re.fullmatch(r"[1-9]\d*[MGT]", self.memory):
            raise ConfigError(f"--memory {self.memory!r} is not an amount of memory", hint="such as 256G: a number, and M, G or T")
        if chosen == ["slurm"]:
            self._check_slurm()
        elif chosen == ["k8s"]:
            self._check_k8s()
        elif not chosen:
            self._check_here()

    def _check_here(self) -> None:
        if self.nnodes == 1:
            self.refuse_without_effect(
                ("node_rank", "master_addr", "master_port", "rdzv_endpoint", "rdzv_id"), "with one machine: --nnodes says how many"
            )
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"--node_rank {self.node_rank} does not fit --nnodes {self.nnodes}", hint="the first machine is 0")
        if self.rdzv_endpoint is not None:
            self.refuse_without_effect(("master_addr", "master_port"), "with --rdzv_endpoint")
            if not re.fullmatch(r"[^\s:]+:\d{1,5}", self.rdzv_endpoint):
                raise ConfigError(f"--rdzv_endpoint {self.rdzv_endpoint!r} is not HOST:PORT", hint="such as node0:29500")
        elif self.nnodes > 1 and not self.said("master_addr"):
            raise ConfigError(
                f"--nnodes {self.nnodes} needs the address of the first machine", hint="say --master_addr, or --rdzv_endpoint HOST:PORT"
            )
        elif self.nnodes > 1 and not self.said("node_rank"):
            raise ConfigError(f"--nnodes {self.nnodes} needs --node_rank, the number of this machine", hint="the first is 0")

    def _check_slurm(self) -> None:
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}", self.time):
            raise ConfigError(f"--time {self.time!r} is not a time of Slurm", hint="MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES")
        for name in ("partition", "account", "qos", "job_name"):
            if (value := getattr(self, name)) is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
                raise ConfigError(f"--{name} {value!r} is not a name that Slurm takes", hint="use letters, digits, dots and dashes")

    def _check_k8s(self) -> None:
        if not self.image:
            raise ConfigError("--k8s needs an image", hint="say --image REGISTRY/NAME:TAG, with this package in it")
        # A pod is named after its job: NAME-INDEX has to be a label of at most 63 characters.
        for name, longest in (("job_name", 52), ("namespace", 63), ("kueue", 63), ("volume_claim", 63)):
            if (value := getattr(self, name)) is None:
                continue
            if len(value) > longest or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", value):
                raise ConfigError(
                    f"--{name} {value!r} is not a name that Kubernetes takes", hint=f"at most {longest} of a-z, 0-9 and -, as in my-run"
                )


def is_training(words: Sequence[str]) -> bool:
    """Whether ``words`` are a command that several processes do together."""
    return bool(words) and (words[0] in TRAINING or (words[0] == MEGATRON and len(words) > 1))


def words_of_environment(command: list[str], more: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> list[str] | None:
    """The words of ``swift launch`` that NPROC_PER_NODE and the variables beside it ask for, as ms-swift reads them.

    None if they ask for one process, or if a launcher has started this one already: it has a LOCAL_RANK then. RANK alone
    says nothing: operators of Kubernetes number machines by it. ``more`` are flags that stand before the command.
    """
    env = os.environ if environment is None else environment
    if not is_training(command) or env.get("LOCAL_RANK") or {"--help", "-h"} & set(command) or "--show_config" in more:
        return None
    said = {option: env[name] for name, option in VARIABLES.items() if env.get(name)}
    if said.get("nnodes", "1") == "1":  # a cluster sets the others for one machine too
        said = {"nproc_per_node": said.get("nproc_per_node", "1")}
        if said["nproc_per_node"] == "1":
            return None
    whole = [*command, *more]
    try:
        build(LaunchConfig, ("environment", {**said, "command": whole}))
    except ConfigError as problem:
        names = {f"--{option}": name for name, option in VARIABLES.items()}
        message = re.sub(r"--\w+", lambda match: names.get(match[0], match[0]), problem.message)
        hint = f"it comes from the environment, where {', '.join(name for name in VARIABLES if env.get(name))} are set"
        raise ConfigError(message, hint=hint) from None
    return ["launch", *(f"--{option}={value}" for option, value in said.items()), "--", *whole]
