"""The tools that the benchmarks compare, and how each is told to do the same job.

Nothing of a tool is imported here: each runs as its users run it, as a command in its own environment. An option that
is not named is left at the tool's default.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peer import BENCH, PEERS
from rows import Row, write_jsonl

ROWS_PER_STEP = 16
JOBS = ("lora", "full", "dpo")
TEMPLATE = BENCH / "chatml.jinja"
# What ours and ms-swift spell alike: LoRA or all weights, float32, rows in file order and one pass over them, one
# logged loss a step, nothing saved but the log.
SAME_TRAINING = (
    "--torch_dtype float32 --attn_impl sdpa --gradient_checkpointing false"
    " --truncation_strategy right --dataset_shuffle false --train_dataloader_shuffle false --num_train_epochs 1"
    " --learning_rate 1e-4 --lr_scheduler_type cosine --weight_decay 0 --adam_beta2 0.999 --max_grad_norm 1.0"
    " --seed 42 --logging_steps 1 --save_strategy no --eval_strategy no --report_to none --add_version false"
).split()
SAME_LORA = "--tuner_type lora --lora_rank 8 --lora_alpha 16 --lora_dropout 0 --target_modules all-linear".split()
# ms-swift refuses a local model without a model type; float32 on a CPU would switch fp16 autocast on; and it would ask
# a hub for 20 s, offline, whether a local model is the latest.
MS_SWIFT_ALONE = (
    "--model_type llama --template chatml --use_cpu true --bf16 false --fp16 false --warmup_ratio 0"
    " --check_model false --split_dataset_ratio 0 --dataset_num_proc 1 --dataloader_num_workers 0"
).split()


@dataclass(frozen=True)
class Job:
    """What to train: ``kind`` of JOBS, a model's directory, rows, and the length at which these are cut."""

    kind: str
    model: Path
    rows: Sequence[Row]
    max_length: int

    @property
    def batch(self) -> tuple[int, int]:
        """(rows of a batch, batches of a step); a pair for preferences is two sequences."""
        return (2, 8) if self.kind == "dpo" else (4, 4)


@dataclass(frozen=True)
class Peer:
    """A tool in one of its modes. ``prepare(job, scratch)`` writes its files and gives the arguments of its command."""

    name: str
    python: Path
    script: str
    prepare: Callable[[Job, Path], list[str]]
    jobs: tuple[str, ...] = ("lora", "full")

    @property
    def command(self) -> list[str]:
        """The console script beside the interpreter; exits with a hint if the tool is not installed."""
        script = self.python.parent / self.script
        if not script.exists():
            how = "pip install -e ." if PEERS not in script.parents else f"bench/peers.sh {script.parents[1].name}"
            sys.exit(f"{self.name}: {script} does not exist; make it with: {how}")
        return [str(script)]

    def train_command(self, job: Job, scratch: Path) -> list[str]:
        scratch.mkdir(parents=True, exist_ok=True)
        return [*self.command, *self.prepare(job, scratch)]


def options(**values: Any) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def _swift(alone: Sequence[str], packing: bool, job: Job, scratch: Path) -> list[str]:
    """Ours and ms-swift: the same options under the same names."""
    values: list[dict[str, Any]] = [{"messages": row.messages} for row in job.rows]
    if job.kind == "dpo":
        values = [{**value, "rejected_response": row.rejected} for value, row in zip(values, job.rows, strict=True)]
    dataset = write_jsonl(scratch / "train.jsonl", values)
    command = ["rlhf", "--rlhf_type", "dpo", "--beta", "0.1"] if job.kind == "dpo" else ["sft"]
    own = options(model=job.model, dataset=dataset, output_dir=scratch / "output", max_length=job.max_length)
    size, accumulated = job.batch
    batch = options(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    tuner = ["--tuner_type", "full"] if job.kind == "full" else SAME_LORA
    return [*command, *own, *batch, *tuner, *SAME_TRAINING, *(["--packing", "true"] if packing else []), *alone]


def _trl(packing: bool, job: Job, scratch: Path) -> list[str]:
    folder = scratch / "rows"
    if job.kind == "dpo":
        last = [[{"role": "assistant", "content": row.rejected}] for row in job.rows]
        values: list[dict[str, Any]] = [
            {"prompt": row.messages[:-1], "chosen": row.messages[-1:], "rejected": rejected}
            for row, rejected in zip(job.rows, last, strict=True)
        ]
        alone = options(beta=0.1)
    else:
        values = [{"messages": row.messages} for row in job.rows]
        alone = options(assistant_only_loss="true", chat_template_path=TEMPLATE, eos_token="<|im_end|>")
    write_jsonl(folder / "train.jsonl", values)
    size, accumulated = job.batch
    tuner = options(use_peft="true", lora_r=8, lora_alpha=16, lora_dropout=0, lora_target_modules="all-linear")
    shared = options(
        model_name_or_path=job.model,
        dataset_name=folder,
        output_dir=scratch / "output",
        max_length=job.max_length,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        dtype="float32",
        attn_implementation="sdpa",
        num_train_epochs=1,
        learning_rate="1e-4",
        lr_scheduler_type="cosine",
        weight_decay=0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        use_cpu="true",
        bf16="false",
        gradient_checkpointing="false",
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        seed=42,
    )
    packed = options(packing="true", packing_strategy="bfd") if packing else []
    kind = "dpo" if job.kind == "dpo" else "sft"
    return [kind, *shared, *([] if job.kind == "full" else tuner), *alone, *packed]


def _transformers(job: Job, scratch: Path) -> list[str]:
    dataset = write_jsonl(scratch / "train.jsonl", [{"messages": row.messages} for row in job.rows])
    program = BENCH / "trainer.py"
    return list(map(str, (program, job.kind, job.model, dataset, scratch / "output", job.max_length)))


def _llama_factory(packing: bool, job: Job, scratch: Path) -> list[str]:
    """A configuration file: JSON, which is YAML, but under a name without which it is not read."""
    columns = {"messages": "messages"}
    names = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
    values: list[dict[str, Any]] = [{"messages": row.messages} for row in job.rows]
    if job.kind == "dpo":
        columns |= {"chosen": "chosen", "rejected": "rejected"}
        values = [
            {
                "messages": row.messages[:-1],
                "chosen": row.messages[-1],
                "rejected": {"role": "assistant", "content": row.rejected},
            }
            for row in job.rows
        ]
    dataset = write_jsonl(scratch / "train.jsonl", values)
    about = {"file_name": dataset.name, "formatting": "sharegpt", "columns": columns, "tags": names, "ranking": job.kind == "dpo"}
    (scratch / "dataset_info.json").write_text(json.dumps({"rows": about}), encoding="utf-8")
    size, accumulated = job.batch
    config: dict[str, Any] = {
        "model_name_or_path": str(_float32(job.model, scratch)),
        "stage": "dpo" if job.kind == "dpo" else "sft",
        "do_train": True,
        "finetuning_type": "full" if job.kind == "full" else "lora",
        "dataset": "rows",
        "dataset_dir": str(scratch),
        "output_dir": str(scratch / "output"),
        "template": "chatml",
        "cutoff_len": job.max_length,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": 1.0,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 42,
    }
    if job.kind != "full":
        config |= {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target": "all"}
    if job.kind == "dpo":
        config |= {"pref_beta": 0.1, "pref_loss": "sigmoid"}
    if packing:
        config["neat_packing"] = True
    path = scratch / "train.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return ["train", str(path)]


def _float32(model: Path, scratch: Path) -> Path:
    """``model``, or a copy whose configuration says float32: LLaMA-Factory computes in the precision named there."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config.get("dtype", config.get("torch_dtype")) == "float32":
        return model
    copy = scratch / "float32"
    copy.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file.resolve())
    config.pop("torch_dtype", None)
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    return copy


def logged_losses(output: Path, log: str) -> list[float]:
    """The loss of each step as the tool itself logged it: in a file of its output directory, or else on the console."""
    for name in ("logging.jsonl", "trainer_log.jsonl"):
        if (output / name).exists():
            rows = [json.loads(line) for line in (output / name).read_text(encoding="utf-8").splitlines()]
            return [row["loss"] for row in rows if "loss" in row]
    return [float(loss) for loss in re.findall(r"\{'loss': '?([\d.e+-]+)", log)]


def _peers() -> dict[str, Peer]:
    ours, home = Path(sys.executable), {name: PEERS / name / "bin" / "python" for name in ("ms-swift", "llama-factory", "trl")}
    every = (
        Peer("swift", ours, "swift", partial(_swift, (), False)),
        Peer("swift-packed", ours, "swift", partial(_swift, (), True)),
        Peer("ms-swift", home["ms-swift"], "swift", partial(_swift, MS_SWIFT_ALONE, False), JOBS),
        Peer("ms-swift-packed", home["ms-swift"], "swift", partial(_swift, MS_SWIFT_ALONE, True)),
        Peer("llama-factory", home["llama-factory"], "llamafactory-cli", partial(_llama_factory, False), JOBS),
        Peer("llama-factory-packed", home["llama-factory"], "llamafactory-cli", partial(_llama_factory, True)),
        Peer("trl", home["trl"], "trl", partial(_trl, False), JOBS),
        Peer("trl-packed", home["trl"], "trl", partial(_trl, True)),
        Peer("transformers", home["trl"], "python", _transformers),
    )
    return {peer.name: peer for peer in every}


PEER_BY_NAME = _peers()
