"""What independent packages read in a quantized checkpoint, beside swift's own reader.

    python bench/loaders.py CHECKPOINT... [--loaders transformers gptqmodel vllm] [--dtype float32]

For each package found the largest and the mean difference of the log-probabilities of a text's own tokens. transformers runs in
swift's environment, the others in those that bench/peers.sh makes ($SWIFT_PEERS, by default bench/peers/). They compute in the
precision --dtype; gptqmodel's layers, which know 16 bits alone, are taken as the weights that they show. Models that round
inputs to 8 bits are read twice: ``rounded`` is swift's reading with that rounding, ``as is`` the one with inputs as they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PEERS = Path(os.environ.get("SWIFT_PEERS", Path(__file__).resolve().parent / "peers"))
TEXT = (
    "Heavy snow is expected in the northern districts until 08:00. Clear the pavements and keep the roads free. "
    "The capital of France is Paris. def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n"
)
TIMEOUT_S = 1800


def read_with(name: str, checkpoint: str, ids: list[int], dtype: str) -> list[float]:
    """Log-probabilities of ids[1:], by the package ``name`` of the environment that this runs in."""
    if name == "vllm":
        from vllm import LLM, SamplingParams

        engine = LLM(checkpoint, dtype=dtype, max_model_len=len(ids) + 8, enforce_eager=True, skip_tokenizer_init=True)
        (output,) = engine.generate(
            [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        )
        return [noted[token].logprob for noted, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    import torch

    model: Any
    if name == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        method = json.loads((Path(checkpoint) / "config.json").read_text())["quantization_config"]["quant_method"]
        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.TORCH
        model = GPTQModel.load(checkpoint, backend=backend, device="cpu", dtype=torch.float16).model
        widen(model)
    elif name == "transformers":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    else:
        from swift.model.load import load_model

        model = load_model(Path(checkpoint), torch_dtype="float32", device="cpu", rounds_inputs=name == "rounded").model
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    found: list[float] = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


def widen(model: Any) -> None:
    """Turn layers that compute in float16 alone into ones of float32, with the weights that their outputs show."""
    import torch

    for name, layer in list(model.named_modules()):
        if hasattr(layer, "qweight"):
            with torch.inference_mode():
                bias = layer(torch.zeros(1, layer.in_features, dtype=torch.float16)).float()
                weight = torch.cat([layer(rows) for rows in torch.eye(layer.in_features, dtype=torch.float16).split(64)]).float() - bias
            plain = torch.nn.Linear(layer.in_features, layer.out_features)
            plain.weight.data, plain.bias.data = weight.T.clone(), bias[0].clone()
            model.set_submodule(name, plain)
    model.float()


def python_of(name: str) -> Path | None:
    """The interpreter that has the package, or None."""
    path = Path(sys.executable) if name in ("transformers", "as is", "rounded") else PEERS / name / "bin" / "python"
    return path if path.exists() else None


def environment_of(name: str) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if name != "vllm":
        return os.environ | offline
    library = {"LD_PRELOAD": str(PEERS / "vllm" / "lib" / "libiomp5.so"), "VLLM_CACHE_ROOT": str(PEERS / "vllm" / "cache")}
    return os.environ | offline | library | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def run(name: str, jobs: dict[str, list[int]], dtype: str) -> dict[str, Any]:
    """What ``read_with`` gives for each checkpoint in an interpreter of its own, or the line that says what went wrong there."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = [str(python_of(name)), __file__, "--child", name, json.dumps(jobs), dtype, str(out)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment_of(name), timeout=TIMEOUT_S * len(jobs))
        found = json.loads(out.read_text()) if out.is_file() else {}
        lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line] or ["no output"]
        return {checkpoint: found.get(checkpoint, lines[-1]) for checkpoint in jobs}


def child(name: str, jobs: dict[str, list[int]], dtype: str, out: Path) -> None:
    found: dict[str, Any] = {}
    for checkpoint, ids in jobs.items():
        try:
            found[checkpoint] = read_with(name, checkpoint, ids, dtype)
        except Exception as problem:  # whatever a package raises is its answer
            found[checkpoint] = f"{type(problem).__name__}: {next(iter(str(problem).splitlines()), '')}"
        out.write_text(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, jobs, dtype, out = sys.argv[2:]
        child(name, json.loads(jobs), dtype, Path(out))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--loaders", nargs="+", default=["transformers", "gptqmodel", "vllm"])
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    from transformers import AutoTokenizer

    jobs = {checkpoint: AutoTokenizer.from_pretrained(checkpoint)(TEXT).input_ids for checkpoint in given.checkpoint}
    ours = {name: run(name, jobs, "float32") for name in ("as is", "rounded")}
    for name in given.loaders:
        if python_of(name) is None:
            print(f"{name}: not installed below {PEERS}")
            continue
        # vLLM does not give all memory of one model back for the next.
        for part in [{one: jobs[one]} for one in jobs] if name == "vllm" else [jobs]:
            for checkpoint, theirs in run(name, part, given.dtype).items():
                for kind, own in ours.items():
                    print(f"{checkpoint} {name} {given.dtype} {kind}: {difference(theirs, own[checkpoint])}", flush=True)


def difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, str) or isinstance(ours, str):
        return str(theirs if isinstance(theirs, str) else ours)
    found = [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
    return f"largest {max(found):.2g}, mean {sum(found) / len(found):.2g}"


if __name__ == "__main__":
    main()
