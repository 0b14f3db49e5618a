"""Slurm: the batch script, and processes that srun started."""

import subprocess

import pytest

from swift.config.launch import LaunchConfig
from swift.config.options import build
from swift.errors import ConfigError
from swift.launch.slurm import batch_script
from swift.launch.slurm_step import hosts_of, ranks_of_step


def config(**options):
    return build(LaunchConfig, ("argument", {"slurm": True, "command": ["sft", "--system", "it's $HOME"], **options}))


def test_a_script_of_several_machines(tmp_path):
    options = {
        "nodes": 4,
        "gpus_per_node": 8,
        "cpus_per_gpu": 12,
        "memory": "900G",
        "partition": "gpu",
        "account": "lab",
        "time": "1-12:00:00",
        "max_restarts": 2,
    }
    assert batch_script(config(**options), log_dir=tmp_path) == (
        "#!/bin/bash\n"
        "#SBATCH --job-name=swift-sft\n"
        "#SBATCH --nodes=4\n"
        "#SBATCH --ntasks-per-node=1\n"
        "#SBATCH --cpus-per-task=96\n"
        "#SBATCH --gpus-per-node=8\n"
        "#SBATCH --mem=900G\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --account=lab\n"
        "#SBATCH --time=1-12:00:00\n"
        f"#SBATCH --output={tmp_path}/slurm-%j.log\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --signal=TERM@120\n"
        "set -euo pipefail\n"
        "\n"
        "# The machines meet at the first, on a port that the number of the job chooses.\n"
        'host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        "port=$((20000 + SLURM_JOB_ID % 20000))\n"
        "\n"
        "srun --kill-on-bad-exit=1 --cpus-per-task=96 \\\n"
        f"  swift launch --nproc_per_node=8 --max_restarts=2 --log_dir={tmp_path}"
        ' --nnodes="$SLURM_JOB_NUM_NODES" --rdzv_endpoint="$host:$port" --rdzv_id="$SLURM_JOB_ID"'
        """ -- sft --system 'it'"'"'s $HOME'\n"""
    )


def test_bash_gives_the_words_unchanged(tmp_path):
    # srun and scontrol are functions here; the first prints what it is told to start.
    script = batch_script(config(nodes=2, gpus_per_node=8), log_dir=tmp_path)
    around = 'scontrol() { printf "%s\\n" node3 node4; }; srun() { printf "%s\\n" "$@"; }; SLURM_JOB_ID=20007 SLURM_JOB_NUM_NODES=2'
    done = subprocess.run(["bash", "-c", f"{around} SLURM_JOB_NODELIST=node[3-4]\n{script}"], capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("--") :] == ["--", "sft", "--system", "it's $HOME"]
    assert "--rdzv_endpoint=node3:20007" in words
    assert "--nnodes=2" in words


def test_megatron_is_passed_on_in_its_own_words(tmp_path):
    command = ["megatron", "sft", "--load", "m", "--micro_batch_size", "1"]
    script = batch_script(config(gpus_per_node=8, command=command), log_dir=tmp_path)
    assert "#SBATCH --job-name=swift-megatron-sft\n" in script
    assert script.endswith(f" --log_dir={tmp_path} -- megatron sft --load m --micro_batch_size 1\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "tomorrow"}, "--time 'tomorrow' is not a time of Slurm"),
        ({"partition": "a b"}, "--partition 'a b' is not a name that Slurm takes"),
        ({"memory": "lots"}, "--memory 'lots' is not an amount of memory"),
        ({"image": "x"}, "--image has no effect with --slurm"),
        ({"nproc_per_node": 2}, "--nproc_per_node has no effect with --slurm"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.message.startswith(message)


STEP = {
    "SLURM_JOB_ID": "41234",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
}


def test_a_task_of_srun_is_a_rank():
    assert ranks_of_step(STEP) == {
        "RANK": "9",
        "WORLD_SIZE": "10",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "21234",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        STEP | {"RANK": "0"},  # torchrun inside of srun has said it
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "10", "SLURM_JOB_NODELIST": "gpu[07-09]"},  # the batch script itself
        STEP | {"NPROC_PER_NODE": "8"},  # each task is to start ranks itself
    ],
)
def test_any_other_process_is_left_alone(environment):
    assert ranks_of_step(environment) == {}


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("one", ["one"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("a[1,3]-ib", ["a1-ib", "a3-ib"]),
    ],
)
def test_lists_of_hosts_as_slurm_writes_them(nodelist, hosts):
    assert hosts_of(nodelist) == hosts
