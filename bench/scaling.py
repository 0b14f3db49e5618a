"""Which way to spread a model over cards: memory and traffic of every arrangement, by the formulas of swift.parallel.cost.

    python bench/scaling.py                        # 7B, 70B and a 235B mixture of experts on 1, 8, 64 and 512 cards
    python bench/scaling.py --config config.json --cards 8 64 --card_gib 24 --tuner lora
    python bench/scaling.py --json                 # one JSON line a row

Of the arrangements that fit into --share of a card's memory, the one with the shortest step is shown. A step is computation
at --tflops, longer by the idle share of a pipeline, and traffic at the speed of the links, as if nothing of it were hidden:
that ranks arrangements, and predicts no machine. Tensor and sequence parallelism stay within a node. Where none fits, parts
are put into main memory, of which each card has --host_gib.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from swift.parallel.cost import Memory, Shape, Spread, Traffic, Work, memory, traffic

GIB = 2**30
CARDS_PER_NODE = 8
MODELS: dict[str, dict[str, Any]] = {
    "7B (Qwen2.5-7B)": {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "70B (Llama-3-70B)": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "235B of experts (Qwen3-235B-A22B)": {
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
# float32 weights that compute in bfloat16; frozen weights in 16 or 4 bits (embedding and head in 16) under an adapter of
# 0.5 % of their number.
TUNERS = {
    "full": {"weight_bytes": 4.0, "trained": 1.0},
    "lora": {"weight_bytes": 2.0, "trained": 0.005},
    "qlora": {"weight_bytes": 0.52, "travel_bytes": 0.52, "outside_bytes": 2.0, "trained": 0.005},
}


@dataclass(frozen=True)
class Machine:
    """Cards and links: GiB of memory, floating-point operations and bytes a second."""

    card_gib: float
    share: float
    tflops: float
    near_gb_per_s: float
    far_gb_per_s: float
    host_gib: float
    host_gb_per_s: float


@dataclass(frozen=True)
class Row:
    spread: Spread
    work: Work
    memory: Memory
    traffic: Traffic
    computes_s: float
    sends_s: float

    @property
    def step_s(self) -> float:
        return self.computes_s + self.sends_s


def rows(shape: Shape, work: Work, cards: int, tokens: int, machine: Machine) -> Iterator[Row]:
    """Every arrangement of ``cards`` that divides, with ``tokens`` a step."""
    powers = [2**power for power in range(10)]
    for tp, pp, shards in itertools.product(powers[:4], powers[:5], (False, True)):
        ways = 1 if cards % (tp * pp) else cards // (tp * pp)
        if cards % (tp * pp) or shape.kv_heads % tp or shape.layers < pp or tokens % ways:
            continue
        for ep in powers[:7] if shape.experts else [1]:
            if ways % ep or (shape.experts and shape.experts % ep):
                continue
            spread = Spread(dp=ways, tp=tp, pp=pp, ep=ep, shards=shards and ways > 1)
            if spread.shards != shards:
                continue
            passes = max(tokens // ways // work.tokens, 1)
            own = replace(work, micro_batches=passes, tokens=min(work.tokens, tokens // ways))
            yield measured(shape, own, spread, tokens, machine)


def offloaded(shape: Shape, work: Work, cards: int, tokens: int, machine: Machine) -> Row:
    """Parts of everything in main memory."""
    own = replace(work, micro_batches=max(tokens // cards // work.tokens, 1), tokens=min(work.tokens, tokens // cards))
    return measured(shape, own, Spread(dp=cards, offload=True), tokens, machine)


def measured(shape: Shape, work: Work, spread: Spread, tokens: int, machine: Machine) -> Row:
    sent = traffic(shape, work, spread)
    active = shape.parameters - shape.layers * shape.feedforward * (1 - shape.experts_per_token / shape.experts if shape.experts else 0)
    # Forward, backward by inputs and by weights, and the forward pass again where activations are computed anew.
    passes = 2 + 2 + 2 * (work.trained == 1) + 2 * work.checkpointing
    computes = active * tokens * passes / spread.processes / (machine.tflops * 1e12)
    idle = (spread.pp - 1) / (work.micro_batches + spread.pp - 1)
    far = sent.gradients + sent.weights + sent.stages
    is_one_node = spread.processes <= CARDS_PER_NODE
    near = sent.layers + sent.sequence + (far if is_one_node else 0.0)
    if spread.tp * spread.ep <= CARDS_PER_NODE:  # neighbours share experts
        near += sent.experts
    else:
        far += sent.experts
    sends = near / (machine.near_gb_per_s * 1e9) + (0.0 if is_one_node else far) / (machine.far_gb_per_s * 1e9)
    sends += sent.host / (machine.host_gb_per_s * 1e9)
    return Row(spread, work, memory(shape, work, spread), sent, computes / (1 - idle), sends)


def flags(row: Row, tuner: str) -> str:
    """The options that ask for it."""
    spread, words = row.spread, []
    if tuner != "full":
        words.append("--tuner_type lora" + (" --quant_method bnb --quant_bits 4" if tuner == "qlora" else ""))
    else:
        words.append("--tuner_type full --torch_dtype float32 --bf16 true")
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "ep": "expert_model_parallel_size"}
    words += [f"--{name} {getattr(spread, axis)}" for axis, name in names.items() if getattr(spread, axis) > 1]
    if spread.offload:
        words.append("--fsdp fsdp2 --fsdp_cpu_offload true" if spread.processes > 1 else "--deepspeed zero3_offload")
    elif spread.shards:
        words.append("--fsdp fsdp2")
    return " ".join([*words, f"--gradient_accumulation_steps {row.work.micro_batches}"])


def facts(row: Row | None, tuner: str, *, fits: bool) -> dict[str, Any]:
    """What is known of an arrangement, for --json: bytes by what they are for, and seconds by the formulas."""
    if row is None:
        return {"fits": False}
    memory, traffic = (
        asdict(row.memory) | {"total": row.memory.total, "host": row.memory.host},
        asdict(row.traffic) | {"total": row.traffic.total},
    )
    return {"fits": fits, "options": flags(row, tuner), "memory": memory, "traffic": traffic, "step_s": row.step_s}


def best(shape: Shape, tuner: str, cards: int, pass_tokens: int, tokens: int, machine: Machine) -> tuple[Row | None, Row | None]:
    """(the fastest arrangement that fits, else the smallest)."""
    work = Work(tokens=pass_tokens, **TUNERS[tuner])
    found = [
        row
        for row in rows(shape, work, cards, tokens, machine)
        if tuner != "qlora" or (row.spread.tp == row.spread.pp == row.spread.ep == 1)
    ]
    fitting = [row for row in found if row.memory.total <= machine.share * machine.card_gib * GIB]
    if not fitting and tuner != "qlora":
        row = offloaded(shape, work, cards, tokens, machine)
        if row.memory.total <= machine.share * machine.card_gib * GIB and row.memory.host <= machine.share * machine.host_gib * GIB:
            fitting = [row]
    smallest = min(found, key=lambda row: row.memory.total, default=None)
    return min(fitting, key=lambda row: (row.step_s, row.memory.total), default=None), smallest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="the config.json of another model")
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--tuner", choices=TUNERS, nargs="+", default=["lora", "qlora", "full"])
    parser.add_argument("--pass_tokens", type=int, default=4096, help="tokens of a forward pass")
    parser.add_argument("--card_gib", type=float, default=80)
    parser.add_argument("--share", type=float, default=0.8, help="of the memory that may be filled")
    parser.add_argument("--tflops", type=float, default=400)
    parser.add_argument("--near_gb_per_s", type=float, default=400, help="between cards of a node")
    parser.add_argument("--far_gb_per_s", type=float, default=40, help="between nodes, for each card")
    parser.add_argument("--host_gib", type=float, default=256, help="of main memory, for each card")
    parser.add_argument("--host_gb_per_s", type=float, default=25, help="between a card and main memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    machine = Machine(**{field.name: getattr(options, field.name) for field in fields(Machine)})
    models = MODELS if options.config is None else {options.config.parent.name: json.loads(options.config.read_text(encoding="utf-8"))}
    if not options.json:
        print("| model | cards | tuner | arrangement | GiB a card | sent GB a step and card | options |")
        print("|---|---|---|---|---|---|---|")
    for (name, config), cards, tuner in itertools.product(models.items(), options.cards, options.tuner):
        tokens = 65536 * max(1, cards // 8)
        shape = Shape.of(config)
        if tuner == "qlora" and shape.experts:
            continue  # bitsandbytes quantizes linear layers; experts in one tensor, as transformers keeps them, stay in 16 bits
        row, smallest = best(shape, tuner, cards, options.pass_tokens, tokens, machine)
        if options.json:
            print(json.dumps({"model": name, "cards": cards, "tuner": tuner, **facts(row or smallest, tuner, fits=row is not None)}))
        elif row is None:
            least = f"does not fit: {smallest.memory.total / GIB:,.0f} GiB at least" if smallest else "does not divide"
            print(f"| {name} | {cards} | {tuner} | {least} | | | |")
        else:
            axes = [f"{axis} {size}" for axis in ("pp", "dp", "tp", "ep") if (size := getattr(row.spread, axis)) > 1]
            text = " x ".join(axes) + (", sharded" if row.spread.shards and not row.spread.offload else "")
            if row.spread.offload:
                text = f"{text or 'one process'}, in main memory ({row.memory.host / GIB:.0f} GiB)"
            figures = f"{row.memory.total / GIB:.0f} | {row.traffic.total / 1e9:.1f}"
            print(f"| {name} | {cards} | {tuner} | {text or 'one process'} | {figures} | `{flags(row, tuner)}` |")


if __name__ == "__main__":
    main()
