"""Several processes: seconds a step and memory of each process, beside bare loops over torch and DeepSpeed, and ms-swift.

    python bench/parallel.py                                   # 1, 2 and 4 processes, every tool
    python bench/parallel.py --processes 2 --tool swift-fsdp2 bare-fsdp2 --rounds 5
    python bench/parallel.py --processes 2 --tool paired-fsdp2 --steps 20
    python bench/parallel.py --layers 8 --width 256 --length 256 --json

All train all weights of the same random Llama on the same rows of one length in float32, with AdamW, as many rows in each
process. The bare loop is what torch's tutorial has: `fully_shard` on each block and on the model, transformers' own loss,
clipping, `AdamW(fused=True)`. Tools take turns, --rounds times, each in processes of its own (`torch.distributed.run`, one
thread each); a step's time is the median of its steps after the first two, of the slowest process. `held` are bytes of
weights and optimizer state in a process, counted from the tensors; `rss` is the peak over what the process had
when its model was loaded. Absolute numbers of a machine with fewer cores than processes mean nothing; ratios of one line of
the table to another with as many processes do.

`paired-fsdp2`, `paired-ddp` and `paired-single` have both, swift and the bare loop, in the same processes and let their steps
take turns: what else the machine does meets both, and the ratio of two neighbouring steps is known to a percent.

ms-swift runs from its environment, which `bench/peers.sh ms-swift` makes. It has no FSDP on CPUs: its `--fsdp` trains copies.
"""

import argparse
import functools
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peer import PEERS

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("swift-ddp", "swift-fsdp2", "swift-tp", "bare-ddp", "bare-fsdp2", "ms_swift-ddp")
ZERO = tuple(f"{owner}-zero{stage}" for stage in range(4) for owner in ("swift", "deepspeed", "ms_swift"))
ALONE = ("swift-single", "bare-single", "ms_swift-single")
PAIRED = ("paired-fsdp2", "paired-ddp", "paired-single")
SETTINGS = {"rows": 2, "steps": 8}


def make_model(folder: Path, layers: int, width: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import make_tokenizer

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    fields = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    config = LlamaConfig(vocab_size=8192, num_key_value_heads=width // 64, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **fields)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


def local_bytes(tensors: Any) -> int:
    return sum((getattr(each, "_local_tensor", each)).numel() * each.element_size() for each in tensors)


def finish(times: list[float], held: int, before: int, beside: list[float] | None = None) -> None:
    """Print what this process measured, as one line. ``beside`` are the steps of another loop that took turns with it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = "\nmeasured " + json.dumps({"times": times, "held": held, "rss": peak - before, "beside": beside or []}) + "\n"
    sys.stdout.flush()
    os.write(1, line.encode())  # at once: the processes write into one stream


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_swift(tool: str, folder: Path, length: int) -> None:
    from swift.api import pt
    from swift.train.run import Session

    times: list[float] = []
    beside: list[float] = []
    kind = tool.partition("-")[2]
    other: Iterator[float] = bare_steps(f"bare-{kind}", folder, length)[1] if tool.startswith("paired") else iter(())
    held, before = 0, 0
    step, ends, begins = Session._step, Session.run_to_end, Session.__init__

    def timed(self: Any, *arguments: Any) -> None:
        nonlocal held
        begin = time.perf_counter()
        step(self, *arguments)
        times.append(time.perf_counter() - begin)
        beside.extend(itertools.islice(other, 1))

    def counted(self: Any) -> Any:
        nonlocal held
        result = ends(self)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if hasattr(self.strategy, "local_bytes"):
            held = sum(self.strategy.local_bytes().values())
        else:
            held = local_bytes(trained) + local_bytes(value for own in self.optimizer.state.values() for value in own.values())
        return result

    def begun(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal before
        before = resident()
        begins(self, *arguments, **options)

    Session._step, Session.run_to_end, Session.__init__ = timed, counted, begun  # type: ignore[method-assign]
    options: dict[str, Any] = {"fsdp2": {"fsdp": "fsdp2"}, "tp": {"tensor_model_parallel_size": int(os.environ["WORLD_SIZE"])}}.get(
        kind, {}
    )
    if kind.startswith("zero"):
        options = {"deepspeed": kind}
    if kind == "tp":  # the group reads the rows that as many processes would read
        options["gradient_accumulation_steps"] = int(os.environ["WORLD_SIZE"])
    pt(
        model=str(folder),
        dataset=str(folder / "rows.jsonl"),
        output_dir=str(folder / f"out-{tool}-{os.environ['WORLD_SIZE']}-{time.time_ns() // 10**9 // 100}"),
        **({"tuner_type": "full", "max_length": length, "truncation_strategy": "right", "max_steps": SETTINGS["steps"]}),
        **({"per_device_train_batch_size": SETTINGS["rows"], "save_strategy": "no", "report_to": "none", "report_samples": 0}),
        **(
            {"learning_rate": 1e-4, "share_prefixes": False, "gradient_checkpointing": False} | {"gradient_accumulation_steps": 1} | options
        ),
    )
    finish(times, held, before, beside)


def batches(folder: Path, length: int, rank: int, size: int) -> list[Any]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(json.loads(line)["text"])["input_ids"][:length] for line in (folder / "rows.jsonl").read_text().splitlines()]
    count = SETTINGS["rows"] * size
    steps = [rows[at * count : (at + 1) * count] for at in range(SETTINGS["steps"])]
    return [torch.tensor(step[rank * SETTINGS["rows"] : (rank + 1) * SETTINGS["rows"]]) for step in steps]


def run_bare(tool: str, folder: Path, length: int) -> None:
    from torch import distributed as dist

    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    tensors, steps = bare_steps(tool, folder, length)
    before = resident()
    times = list(steps)
    finish(times, local_bytes(tensors()), before)


def bare_steps(tool: str, folder: Path, length: int) -> tuple[Callable[[], Iterator[Any]], Iterator[float]]:
    """(what gives the tensors of weights and optimizer, the seconds of each step, which is made when it is asked for)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizers: list[torch.optim.Optimizer] = []

    def tensors() -> Iterator[Any]:
        yield from model.parameters()
        for optimizer in optimizers:
            yield from (value for own in optimizer.state.values() for value in own.values())

    def steps() -> Iterator[float]:
        network: Any = model
        if tool == "bare-fsdp2":
            from torch.distributed.fsdp import fully_shard

            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
        elif tool == "bare-ddp":
            network = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        optimizers.append(optimizer)
        for ids in batches(folder, length, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])):
            begin = time.perf_counter()
            network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield time.perf_counter() - begin

    return tensors, steps()


def run_deepspeed(tool: str, folder: Path, length: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from swift.parallel.deepspeed import package

    deepspeed = package.load("cpu")
    torch.distributed.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    before = resident()
    settings = {
        "train_micro_batch_size_per_gpu": SETTINGS["rows"],
        "zero_optimization": {"stage": int(tool[-1])},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    times = []
    for ids in batches(folder, length, rank, size):
        begin = time.perf_counter()
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        times.append(time.perf_counter() - begin)
    finish(times, 0, before)


def run_ms_swift(tool: str, folder: Path, length: int) -> None:
    import deepspeed.ops
    from swift.pipelines import pretrain_main
    from transformers import Trainer, TrainerCallback

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled, for minutes
    times: list[float] = []
    before, begin = 0, 0.0

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal begin
            begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - begin)

    begins = Trainer.__init__

    @functools.wraps(begins)  # its parameters are looked at
    def begun(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal before
        before = resident()
        begins(self, *arguments, **options)
        self.add_callback(Timer())

    Trainer.__init__ = begun
    words = {"model": folder, "dataset": folder / "messages.jsonl", "output_dir": folder / "out-ms-swift", "model_type": "llama"}
    words |= {"template": "dummy", "torch_dtype": "float32", "tuner_type": "full", "max_length": length, "truncation_strategy": "right"}
    words |= {"max_steps": SETTINGS["steps"], "per_device_train_batch_size": SETTINGS["rows"], "gradient_accumulation_steps": 1}
    words |= {"learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
    words |= {"gradient_checkpointing": "false", "attn_impl": "sdpa", "use_cpu": "true", "bf16": "false", "fp16": "false"}
    words |= {"split_dataset_ratio": 0, "dataset_num_proc": 1, "dataloader_num_workers": 0, "optim": "adamw_torch_fused"}
    kind = tool.removeprefix("ms_swift-")
    if kind == "zero3":  # transformers asks DeepSpeed for the number of processes before anyone has told it
        deepspeed.init_distributed("gloo", verbose=False)
    words |= {"deepspeed": kind} if kind.startswith("zero") else {}
    pretrain_main([text for name, value in words.items() for text in (f"--{name}", str(value))])
    finish(times, 0, before)


RUNS: dict[str, Callable[[str, Path, int], None]] = {
    "swift": run_swift,
    "paired": run_swift,
    "bare": run_bare,
    "deepspeed": run_deepspeed,
    "ms_swift": run_ms_swift,
}


def measure(tool: str, processes: int, folder: Path, length: int) -> dict[str, Any]:
    """Seconds a step, the largest number of bytes held and the largest peak of one run; or why it failed."""
    is_peer = tool.startswith("ms_swift")
    python = str(PEERS / "ms-swift" / "bin" / "python") if is_peer else sys.executable
    words = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    words += ["--worker", tool, "--folder", str(folder), "--length", str(length), "--steps", str(SETTINGS["steps"])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"USE_HF": "1", "HF_HUB_OFFLINE": "1"} if is_peer else {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=folder)
    found = [json.loads(line.split("measured ", 1)[1]) for line in done.stdout.splitlines() if "measured {" in line]
    if len(found) != processes or any(len(each["times"]) < SETTINGS["steps"] for each in found):
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"error": next((line for line in lines if re.search(r"\w(Error|Exception): (?!\()", line)), lines[-1])[:200]}
    steps = [max(each["times"][at] for each in found) for at in range(2, SETTINGS["steps"])]
    beside = [max(each["beside"][at] for each in found) for at in range(2, SETTINGS["steps"])] if found[0]["beside"] else []
    ratios = [own / other for own, other in zip(steps, beside, strict=False)]
    return {
        "ratios": ratios,
        "step_s": statistics.median(steps),
        "held": max(each["held"] for each in found),
        "rss": max(each["rss"] for each in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tool", nargs="+", choices=(*ALONE, *TOOLS, *ZERO, *PAIRED))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    SETTINGS["steps"] = options.steps
    if options.worker:
        RUNS[options.worker.split("-")[0]](options.worker, options.folder, options.length)
        return
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="parallel-") as name:
        folder = Path(name)
        make_model(folder, options.layers, options.width)
        with (folder / "rows.jsonl").open("w") as file, (folder / "messages.jsonl").open("w") as messages:
            for row in range(SETTINGS["rows"] * SETTINGS["steps"] * max(options.processes)):
                words = " ".join(f"snow {row * 7 + at}" for at in range(options.length))
                file.write(json.dumps({"text": words}) + "\n")
                messages.write(json.dumps({"messages": [{"role": "assistant", "content": words}]}) + "\n")
        if not options.json:
            print("| processes | tool | s a step (spread) | MB held | MB peak over the loaded model |\n|---|---|---|---|---|")
        for processes in options.processes:
            tools = [tool for tool in options.tool or (*ALONE, *TOOLS, *ZERO) if tool.endswith("single") == (processes == 1)]
            results: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
            for _ in range(options.rounds):
                for tool in tools:
                    results[tool].append(measure(tool, processes, folder, options.length))
            for tool, found in results.items():
                good = [each for each in found if "error" not in each]
                if options.json:
                    print(json.dumps({"processes": processes, "tool": tool, "runs": found}), flush=True)
                elif not good:
                    print(f"| {processes} | {tool} | failed: {found[0]['error']} | | |", flush=True)
                else:
                    steps = sorted(each["step_s"] for each in good)
                    held, rss = max(each["held"] for each in good) / 1e6, max(each["rss"] for each in good) / 1e6
                    ratios = sorted(ratio for each in good for ratio in each["ratios"])
                    shown = f"{statistics.median(steps):.3f} ({steps[0]:.3f} to {steps[-1]:.3f})"
                    if ratios:  # the middle half of them too
                        quarter = len(ratios) // 4
                        shown += f", {statistics.median(ratios):.3f} of bare ({ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f})"
                    print(f"| {processes} | {tool} | {shown} | {held:,.1f} | {rss:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
