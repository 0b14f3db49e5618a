"""swift launch and the environment variables of ms-swift: what is started, and what is refused before anything starts."""

import subprocess
import sys

import pytest

from swift import cli
from swift.config import flags
from swift.config.commands import PtConfig
from swift.config.launch import LaunchConfig, words_of_environment
from swift.errors import ConfigError
from swift.launch.rank import resumed
from swift.launch.run import meeting_place, read_command
from swift.parallel.megatron.arguments import words_for_swift

COMMAND = ["sft", "--model", "m", "--dataset", "d"]
MEGATRON = ["megatron", "pt", "--load", "m", "--dataset", "d", "--global_batch_size", "6"]


def parse(*words):
    return flags.parse(LaunchConfig, "launch", "", [*words, "--", *COMMAND])


def test_what_stands_after_the_dashes_is_not_read_here():
    config = flags.parse(LaunchConfig, "launch", "", ["--nproc_per_node", "2", "--", "sft", "--train_type", "full", "--json"])
    assert (config.nproc_per_node, config.command) == (2, ["sft", "--train_type", "full", "--json"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch"], "nothing to launch"),
        (["launch", "--", "eval", "--model", "m"], "swift eval is not done by several processes"),
        (["launch", "--nproc_per_node", "2", "--", "sft", "--modle", "m"], "unknown option --modle"),
        (["launch", "--nproc_per_node", "2", "--", "megatron"], "swift megatron is not done by several processes"),
        (["launch", "--nproc_per_node", "2", "--", "megatron", "rlhf"], "megatron rlhf is not available: it has sft, pt"),
        (["launch", "--nproc_per_node", "2", "--", *MEGATRON, "--lr", "x"], "--learning_rate takes float"),
        (["launch", "--nproc_per_node", "4", "--", *MEGATRON], "--global_batch_size 6 is no multiple of --micro_batch_size 1 x 4"),
        (["launch", "--nproc_per_node", "2", "--node_rank", "1", "--", *COMMAND], "--node_rank has no effect with one machine"),
        (["launch", "--nnodes", "2", "--", *COMMAND], "--nnodes 2 needs the address of the first machine"),
        (["launch", "--nnodes", "2", "--master_addr", "a", "--", *COMMAND], "--nnodes 2 needs --node_rank"),
        (["launch", "--nnodes", "2", "--master_addr", "a", "--node_rank", "2", "--", *COMMAND], "--node_rank 2 does not fit --nnodes 2"),
        (["launch", "--nnodes", "2", "--rdzv_endpoint", "a", "--", *COMMAND], "--rdzv_endpoint 'a' is not HOST:PORT"),
        (["launch", "--nproc_per_node", "0", "--", *COMMAND], "--nproc_per_node takes at least 1, not 0"),
        (["launch", "--num_workers", "2", "--", *COMMAND], "--num_workers has no effect without --slurm, --ray or --k8s"),
        (["launch", "--ray", "--nproc_per_node", "2", "--", *COMMAND], "--nproc_per_node has no effect with --ray"),
        (["launch", "--", *COMMAND], "this machine has no accelerator, so the number of processes is open"),
    ],
)
def test_wrong_options_end_in_one_line_before_anything_starts(words, message):
    with pytest.raises(ConfigError) as caught:
        cli.run(words)
    assert caught.value.message.startswith(message)


def test_the_variables_of_ms_swift_start_processes():
    env = {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29600"}
    words = words_of_environment(COMMAND, ["--json"], env)
    assert words == [
        *["launch", "--nproc_per_node=4", "--nnodes=2", "--node_rank=1", "--master_addr=node0", "--master_port=29600"],
        *["--", *COMMAND, "--json"],
    ]
    # An operator of Kubernetes numbers the machines by RANK and WORLD_SIZE.
    assert words_of_environment(COMMAND, ["--json"], {**env, "RANK": "1", "WORLD_SIZE": "2"}) == words
    config = flags.parse(LaunchConfig, "launch", "", words[1:])
    assert (config.nproc_per_node, config.node_rank, config.command) == (4, 1, [*COMMAND, "--json"])


def test_the_variables_start_processes_of_megatron_too():
    words = words_of_environment(MEGATRON, [], {"NPROC_PER_NODE": "2"})
    assert words == ["launch", "--nproc_per_node=2", "--", *MEGATRON]
    training = read_command(flags.parse(LaunchConfig, "launch", "", words[1:]))
    assert (training.strategy, training.model, training.gradient_accumulation_steps) == ("megatron", "m", 3)


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["--nproc_per_node", "4", "--nnodes", "2", "--rdzv_endpoint", "a:1"], 8),
        (["--slurm", "--nodes", "2", "--gpus_per_node", "8"], 16),
        (["--k8s", "--image", "i", "--nodes", "3", "--gpus_per_node", "0"], 3),
        (["--ray", "--num_workers", "5"], 5),
        ([], None),
    ],
)
def test_the_processes_of_a_run_are_counted_before_it_starts(words, size):
    assert parse(*words).world_size == size


@pytest.mark.parametrize(
    ("command", "env"),
    [
        (COMMAND, {}),
        (["megatron"], {"NPROC_PER_NODE": "2"}),  # its help
        (COMMAND, {"NPROC_PER_NODE": "1"}),
        (COMMAND, {"MASTER_ADDR": "a"}),
        (COMMAND, {"NPROC_PER_NODE": "2", "RANK": "0", "LOCAL_RANK": "0"}),  # it is one of those already
        (["infer", "--model", "m"], {"NPROC_PER_NODE": "2"}),
        ([*COMMAND, "--help"], {"NPROC_PER_NODE": "2"}),
    ],
)
def test_otherwise_they_start_none(command, env):
    assert words_of_environment(command, (), env) is None


def test_torchrun_can_start_the_package_as_a_module():
    done = subprocess.run([sys.executable, "-m", "swift", "sft", "--use_ray", "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "swift launch --ray" in done.stderr  # and who asks for Ray as in ms-swift is told how


def test_a_wrong_variable_is_named():
    with pytest.raises(ConfigError) as caught:
        words_of_environment(COMMAND, (), {"NPROC_PER_NODE": "many"})
    assert caught.value.message == "NPROC_PER_NODE takes int, not 'many'"


def test_machines_meet_at_the_first():
    fields = meeting_place(parse("--nnodes", "2", "--node_rank", "1", "--master_addr", "node0"))
    assert (fields["backend"], fields["endpoint"], fields["rank"]) == ("static", "node0:29500", 1)
    # who may have to meet again numbers itself
    fields = meeting_place(parse("--nnodes", "2", "--node_rank", "1", "--master_addr", "node0", "--max_restarts", "1"))
    assert (fields["backend"], fields["endpoint"], fields["is_host"]) == ("c10d", "node0:29500", False)
    fields = meeting_place(parse("--nnodes", "2", "--rdzv_endpoint", "node0:1234", "--rdzv_id", "7"))
    assert (fields["backend"], fields["endpoint"], fields["run_id"]) == ("c10d", "node0:1234", "7")


def test_the_words_of_a_second_attempt():
    words = ["sft", "r.yaml", "--adapters", "a", "b", "--max_steps", "3", "--resume_from_checkpoint=x", "--resume-only-model", "true"]
    again = ["--resume_from_checkpoint", "run", "--resume_only_model", "false", "--adapters"]
    assert resumed(words, "run") == ["sft", "r.yaml", "--max_steps", "3", *again]
    # What a rank that goes on makes of Megatron's words.
    words = words_for_swift(resumed([*MEGATRON, "--adapters", "a"], "run")[1:], world_size=2)
    training = flags.parse(PtConfig, "pt", "", words[1:])
    assert (training.resume_from_checkpoint, training.adapters, training.model) == ("run", [], "m")
