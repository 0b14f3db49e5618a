"""A process that srun started itself: which rank it is, and where rank 0 is, from what Slurm sets."""

import re
from collections.abc import Mapping


def ranks_of_step(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and the rest, as torchrun sets them, for a process of an srun with several tasks; nothing for any other.

    The batch script itself has SLURM_PROCID too, but is no task of a step: only a step has SLURM_STEP_NUM_TASKS.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or size == "1" or environment.get("NPROC_PER_NODE", "1") != "1":
        return {}
    hosts = hosts_of(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    job = int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or 0)
    # "8(x3),4" is 8 tasks on each of three nodes, and 4 on the last.
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    counts = _counts(environment["SLURM_STEP_TASKS_PER_NODE"]) if tasks else []
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        # Two jobs on one host must not meet: each has ports of its own above 20000.
        "MASTER_ADDR": environment.get("MASTER_ADDR") or hosts[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + job % 20000),
    }
    if node < len(counts):
        found["LOCAL_WORLD_SIZE"] = str(counts[node])
    return found


def _counts(text: str) -> list[int]:
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts


def hosts_of(nodelist: str) -> list[str]:
    """The hosts of a list as Slurm writes it: ``gpu[01-03,7],login`` is gpu01, gpu02, gpu03, gpu7, login."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        hosts += _expand(part)
    return hosts


def _expand(part: str) -> list[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if match is None:
        return [part]
    head, ranges, tail = match.groups()
    numbers: list[str] = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return [f"{head}{number}{rest}" for number in numbers for rest in _expand(tail)]
