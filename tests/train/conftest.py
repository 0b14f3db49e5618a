"""Readers of what a run wrote."""

import json


def metrics(result):
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    clock = {"tokens_per_s", "supervised_tokens_per_s", "pairs_per_s", "memory(GiB)", "eval_runtime"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def losses(result):
    return [line["loss"] for line in metrics(result) if "loss" in line]
