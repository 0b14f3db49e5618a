"""The quantizers that swift is compared with, each as its documentation writes it down, on token ids that it is given.

python bench/quantizers.py NAME JOB.json      (with the Python of bench/peers/NAME)
python bench/quantizers.py NAME imports ARCHITECTURE       only imports what a job needs, with the class of the model
python bench/quantizers.py llm-compressor dense FOLDER FILE      a compressed-tensors checkpoint as float32 weights

JOB.json holds model, ids (a file with one JSON list of token ids a line, all equally long), output, bits, group_size, iters.
What is not said here is the tool's default: order of rounding, dampening, precision of what it computes.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_ids(job: dict[str, Any]) -> list[list[int]]:
    return [json.loads(line) for line in Path(job["ids"]).read_text().splitlines()]


def gptqmodel() -> Callable[[dict[str, Any]], None]:
    # On two cores gptqmodel 7.6.0 makes one worker, of which its loader of models wants two: it fails.
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    os.environ["GPTQMODEL_TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "cache")  # where peers.sh has it compiled

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    def work(job: dict[str, Any]) -> None:
        config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=True)
        model = GPTQModel.load(job["model"], config, device="cpu", dtype=torch.float32)  # bfloat16 if not told
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in load_ids(job)], batch_size=1)
        model.save(job["output"])

    return work


def llm_compressor(method: str) -> Callable[[dict[str, Any]], None]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if method == "awq":
        import torch
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        # llmcompressor 0.14.0.1 pins memory for copies to an accelerator, which fails where there is none.
        torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
    else:
        from llmcompressor.modifiers.gptq import GPTQModifier

    def work(job: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
        ids = load_ids(job)
        data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
        weights = {"num_bits": job["bits"], "type": "int", "strategy": "group", "group_size": job["group_size"]}
        groups = {"all": {"targets": ["Linear"], "weights": weights | {"symmetric": method != "awq"}}}
        if method == "awq":
            recipe: Any = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
        else:
            recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
        oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=len(ids[0]), num_calibration_samples=len(ids))
        model.save_pretrained(job["output"], save_compressed=True)
        AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["output"])

    return work


def auto_round() -> Callable[[dict[str, Any]], None]:
    # The blocks are compiled when they are first met; what comes of it is kept beside the packages.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(sys.prefix) / "cache")

    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def work(job: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        ids = torch.tensor(load_ids(job))
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
        # What `auto-round-light` sets; fewer or more iterations are an option of the benchmark.
        light = {"iters": job["iters"], "lr": 5e-3 if job["iters"] else None, "batch_size": 8}
        rounding = AutoRound(
            model,
            tokenizer,
            bits=job["bits"],
            group_size=job["group_size"],
            sym=True,
            dataset=batches,
            nsamples=len(ids),
            seqlen=ids.shape[1],
            device_map="cpu",
            **light,
        )
        rounding.quantize_and_save(output_dir=job["output"], format="auto_gptq")

    return work


def write_dense(folder: str, file: str) -> None:
    """By the compressed_tensors package, through transformers, without any code of llm-compressor's."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", quantization_config=CompressedTensorsConfig(dequantize=True))
    state = model.state_dict()
    names = {name for name, _ in model.named_parameters() if name.endswith((".weight", ".bias"))}
    save_file({name: value.float().contiguous() for name, value in state.items() if name in names}, file)


TOOLS = {
    "gptqmodel": gptqmodel,
    "llm-compressor": lambda: llm_compressor("gptq"),
    "llm-compressor-awq": lambda: llm_compressor("awq"),
    "auto-round": auto_round,
}


if __name__ == "__main__":
    if sys.argv[2] == "dense":
        write_dense(*sys.argv[3:])
        sys.exit()
    run = TOOLS[sys.argv[1]]()
    if sys.argv[2] == "imports":
        getattr(importlib.import_module("transformers"), sys.argv[3])
    else:
        run(json.loads(Path(sys.argv[2]).read_text()))
