"""Checkpoints of quantizers as float32 weights, by code that shares nothing with swift's own readers of these formats."""

import json
import subprocess
import tempfile
from pathlib import Path

import torch
from peer import BENCH, PEERS
from safetensors.torch import load_file
from torch import Tensor

# N outputs, K inputs, G groups of inputs
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that the nibbles of an int32 hold, the lowest first


def dense(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names, with what is packed unpacked; folders within ``folder`` are looked into.

    Reads GPTQ (both versions, any bits that divide 32), AWQ (gemm) and plain weights; compressed-tensors through the
    package of that name in the environment of llm-compressor.
    """
    folder = _model_folder(folder)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    method = config.get("quant_method")
    if method == "compressed-tensors":
        with tempfile.TemporaryDirectory(prefix="swift-bench-") as scratch:
            file = Path(scratch) / "dense.safetensors"
            python = PEERS / "llm-compressor" / "bin" / "python"
            command = [python, BENCH / "quantizers.py", "llm-compressor", "dense", folder, file]
            done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{folder} cannot be read:\n{done.stderr[-2000:]}")
            return _read([file])
    packed = _read(sorted(folder.glob("*.safetensors")))
    layers = [name.removesuffix("qweight") for name in packed if name.endswith(".qweight")]
    found = {name: value.float() for name, value in packed.items() if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    for layer in layers:
        parts = {name: packed.get(layer + name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        if method == "awq":
            found[f"{layer}weight"] = _awq(parts)
        elif method == "gptq":
            plus = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            found[f"{layer}weight"] = _gptq(parts, config["bits"], plus)
        else:
            raise SystemExit(f"{folder}: {method} is not a format that the benchmark reads")
    return found


def _model_folder(folder: Path) -> Path:
    """auto-round puts its checkpoint into a folder of its own within the one it is told."""
    if (folder / "config.json").exists():
        return folder
    inner = [path.parent for path in folder.glob("*/config.json")]
    if len(inner) != 1:
        raise SystemExit(f"{folder}: {len(inner)} checkpoints found, one was expected")
    return inner[0]


def _read(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    return found


def _gptq(parts: dict[str, Tensor | None], bits: int, plus: int) -> Tensor:
    """(N, K) of words with codes of inputs one after the other; the zeros of version 1 are too small by one."""
    words, zero_words, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    assert words is not None and zero_words is not None and scales is not None
    shifts, mask = torch.arange(0, 32, bits, dtype=torch.int32), 2**bits - 1
    codes = ((words[:, None, :] >> shifts[None, :, None]) & mask).flatten(0, 1)  # (K, N)
    zeros = (((zero_words[:, :, None] >> shifts) & mask).flatten(1) + plus) & mask  # (G, N)
    group = parts["g_idx"]
    index = torch.arange(len(codes)) // (len(codes) // len(scales)) if group is None else group.long()
    return ((codes - zeros[index]).float() * scales.float()[index]).T.contiguous()


def _awq(parts: dict[str, Tensor | None]) -> Tensor:
    """(N, K) of words with four-bit codes of outputs in AWQ's order."""
    words, zero_words, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    assert words is not None and zero_words is not None and scales is not None
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)

    def unpacked(packed: Tensor) -> Tensor:
        nibbles = (packed[:, :, None] >> shifts) & 15
        return nibbles[:, :, torch.tensor(AWQ_ORDER).argsort()].flatten(1)

    size = len(words) // len(scales)
    codes, zeros = unpacked(words), unpacked(zero_words).repeat_interleave(size, 0)  # (K, N)
    return ((codes - zeros).float() * scales.float().repeat_interleave(size, 0)).T.contiguous()
