"""A batch script for Slurm: one swift launch on each machine, which meet at the first."""

import shlex
import subprocess
import textwrap
from pathlib import Path

from swift import console
from swift.config.launch import LaunchConfig
from swift.errors import ConfigError, DependencyError, MachineError
from swift.files import write_text


def launch_slurm(config: LaunchConfig, *, log_dir: Path) -> str:
    """Print the script, or write it to --script, or with --submit give it to sbatch; gives its text."""
    text = batch_script(config, log_dir=log_dir.absolute())
    if config.script is not None:
        write_text(Path(config.script), text)
        console.say(f"wrote {config.script}")
    if config.submit:
        # Slurm does not make the folder in which it writes what the job prints, and then starts no job.
        log_dir.mkdir(parents=True, exist_ok=True)
        console.say(submit(text))
    elif config.script is None:
        print(text, end="")
    return text


def submit(text: str) -> str:
    """What sbatch says of the script; MachineError with its reason if it refuses."""
    try:
        done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DependencyError("sbatch is not on this machine", hint="leave --submit out, and run sbatch where Slurm is") from None
    if done.returncode != 0:
        raise MachineError(f"sbatch refuses the script: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def batch_script(config: LaunchConfig, *, log_dir: Path) -> str:
    """The script, for bash and sbatch. ``log_dir`` is absolute, and the same on all machines."""
    place = str(log_dir)
    if any(character in place for character in "%\\\n "):
        raise ConfigError(f"Slurm cannot write what a job prints to {place!r}", hint="choose a --log_dir without spaces, % and backslashes")
    options = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": config.cpus,
        "gpus-per-node": config.gpus_per_node or None,
        "mem": config.memory,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time,
        "output": f"{place}/slurm-%j.log",
        # A job that is put back into the queue, by preemption or for a broken machine, writes on.
        "open-mode": "append",
        # Slurm tells the processes of srun, so that they save before the time is up.
        "signal": "TERM@120" if config.time else None,
    }
    head = "\n".join(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None)
    words = ["swift", "launch", f"--nproc_per_node={config.gpus_per_node or 1}"]
    words += [f"--max_restarts={config.max_restarts}"] if config.max_restarts else []
    words += [f"--hang_timeout={config.hang_timeout:g}"] if config.given("hang_timeout") else []
    words += [f"--log_dir={place}"]
    several = ""
    if config.nodes > 1:
        several = f"""
        # The machines meet at the first, on a port that the number of the job chooses.
        host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        port={config.master_port if config.given("master_port") else "$((20000 + SLURM_JOB_ID % 20000))"}
        """
    meeting = ['--nnodes="$SLURM_JOB_NUM_NODES"', '--rdzv_endpoint="$host:$port"', '--rdzv_id="$SLURM_JOB_ID"'] if config.nodes > 1 else []
    command = " ".join([shlex.join(words), *meeting, "--", shlex.join(config.command)])
    # --kill-on-bad-exit: when one machine fails for good, the others do not wait for it.
    # --cpus-per-task: since Slurm 22.05 srun does not take that of the job.
    step = f"srun --kill-on-bad-exit=1{f' --cpus-per-task={config.cpus}' if config.cpus else ''}"
    return f"#!/bin/bash\n{head}\nset -euo pipefail\n{textwrap.dedent(several)}\n{step} \\\n  {command}\n"
