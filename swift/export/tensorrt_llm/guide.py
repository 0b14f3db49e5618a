"""build_engine.sh: the commands that make engines of a checkpoint and serve them."""

import shlex
from pathlib import Path
from typing import Any

from swift.config.export import ExportConfig
from swift.files import write_text

SCRIPT = "build_engine.sh"
TOKENIZER = "tokenizer"
_TEXT = """\
#!/bin/sh
# Makes an engine for each GPU of this TensorRT-LLM checkpoint. Needs an NVIDIA GPU of the kind that will serve it, and
# tensorrt_llm 1.2 (pip install tensorrt-llm==1.2.1 --extra-index-url https://pypi.nvidia.com).
# Was not run where the checkpoint was written.
set -e
cd "$(dirname "$0")"
{build}
# To serve it:
# {serve}
"""


def build_arguments(config: ExportConfig, settings: dict[str, Any]) -> list[str]:
    """trtllm-build and its arguments, as tensorrt_llm/commands/build.py of TensorRT-LLM 1.2 declares them."""
    longest = min(config.tensorrt_max_seq_len, settings["max_position_embeddings"])
    return [
        "trtllm-build",
        *("--checkpoint_dir", "."),
        *("--output_dir", "engine"),
        *("--max_batch_size", str(config.tensorrt_max_batch_size)),
        *("--max_input_len", str(min(config.tensorrt_max_input_len, longest))),
        *("--max_seq_len", str(longest)),
        *("--gemm_plugin", "auto"),
    ]


def serve_arguments(settings: dict[str, Any]) -> list[str]:
    """trtllm-serve and its arguments; several ranks are started by mpirun."""
    size = settings["mapping"]["world_size"]
    started = ["mpirun", "-n", str(size), "trtllm-llmapi-launch"] if size > 1 else []
    return [*started, "trtllm-serve", "serve", "engine", "--tokenizer", TOKENIZER, "--backend", "tensorrt"]


def write(folder: Path, config: ExportConfig, settings: dict[str, Any]) -> None:
    """Write the script into ``folder``."""
    build, serve = shlex.join(build_arguments(config, settings)), shlex.join(serve_arguments(settings))
    write_text(folder / SCRIPT, _TEXT.format(build=build, serve=serve))
    (folder / SCRIPT).chmod(0o755)
