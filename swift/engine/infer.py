"""swift infer: answer a data set, or questions in the terminal."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from swift import console
from swift.config.commands import InferConfig
from swift.data.load import load_records
from swift.data.records import Message, Record
from swift.data.render import render_prompt
from swift.engine.load import adapter_or_model_path, load_for_inference, sampling
from swift.engine.text import Completion, complete, stream
from swift.errors import ConfigError
from swift.files import explain_os_errors
from swift.model.load import Loaded
from swift.model.template import read_system


def run_infer(config: InferConfig) -> list[dict[str, Any]] | None:
    """Answers to the rows of --val_dataset (or --dataset), one jsonl line each; a conversation if neither is given."""
    if not (config.dataset or config.val_dataset):
        from swift.engine.chat import converse

        converse(config, load_for_inference(config, merge=config.merge_lora), system=read_system(config.system))
        return None
    records = _records(config)
    place = _result_path(config)
    loaded = load_for_inference(config, merge=config.merge_lora)
    torch.manual_seed(config.seed)
    results = []
    place.parent.mkdir(parents=True, exist_ok=True)
    begin, tokens = time.monotonic(), 0
    with explain_os_errors(place), place.open("x", encoding="utf-8") as file, console.progress() as bar:
        task = bar.add_task("infer", total=len(records), facts="")
        for rows in _batches(records, config.max_batch_size):
            for record, answer in zip(rows, _answer(config, loaded, rows), strict=True):
                result = as_result(record, answer)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                file.flush()
                results.append(result)
                tokens += len(answer.token_ids)
                bar.update(task, advance=1)
    seconds = time.monotonic() - begin
    console.say(
        f"answers: {len(results)}, {tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s); written to {place}"
    )
    return results


def answer_prompts(config: InferConfig, prompts: list[str]) -> list[str]:
    """The answers to ``prompts``, each a user message of its own."""
    system = read_system(config.system)
    start = [Message(role="system", content=system)] if system else []
    records = [Record(messages=[*start, Message(role="user", content=text)], source="argument") for text in prompts]
    loaded = load_for_inference(config, merge=config.merge_lora)
    torch.manual_seed(config.seed)
    return [answer.text for rows in _batches(records, config.max_batch_size) for answer in _answer(config, loaded, rows)]


def _records(config: InferConfig) -> list[Record]:
    """The rows to answer. A run's saved data: its validation rows, split as the run split them."""
    loaded = load_records(
        config.dataset or config.val_dataset,
        want="grpo",
        columns=config.columns,
        strict=config.strict,
        max_rejected=config.max_rejected,
        data_seed=config.data_seed,
        shuffle=config.dataset_shuffle if config.load_data_args else False,
        model_name=config.model_name,
        model_author=config.model_author,
        system=read_system(config.system),
        split_ratio=config.split_dataset_ratio,
        val_datasets=config.val_dataset if config.dataset else [],
        use_hf=config.use_hf,
        hub_token=config.hub_token,
        offline=config.offline,
    )
    for rejected in loaded.rejected:
        console.warn(f"{rejected.source} is left out: {rejected.reason}")
    records = loaded.validation or loaded.train
    return records[: config.val_dataset_sample]


def _result_path(config: InferConfig) -> Path:
    if config.result_path is not None:
        path = Path(config.result_path)
    else:
        folder = adapter_or_model_path(config) or Path("infer_result")
        path = (folder / "infer_result" if folder.name != "infer_result" else folder) / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    if path.exists():
        raise ConfigError(f"--result_path {path} exists", hint="name another file, or remove it")
    return path


def _batches(records: list[Record], size: int) -> Iterator[list[Record]]:
    for at in range(0, len(records), size):
        yield records[at : at + size]


def _answer(config: InferConfig, loaded: Loaded, rows: list[Record]) -> list[Completion]:
    prompts = [
        render_prompt(
            row.messages,
            loaded.tokenizer,
            tools=row.tools,
            enable_thinking=config.enable_thinking,
            use_chat_template=config.use_chat_template is not False,
        )
        for row in rows
    ]
    settings = sampling(config)
    if not (config.stream and len(rows) == 1 and not console.is_json()):
        return complete(loaded.model, loaded.tokenizer, prompts, settings)
    print(f"> {rows[0].messages[-1].text()}")
    pieces = []
    for piece in stream(loaded.model, loaded.tokenizer, prompts[0], settings):
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    print("\n")
    text = "".join(pieces)
    return [Completion(text, loaded.tokenizer(text, add_special_tokens=False).input_ids, "stop")]


def as_result(record: Record, answer: Completion) -> dict[str, Any]:
    """A line of the result file: ms-swift's members, and why the answer ended."""
    messages = [{"role": message.role, "content": message.content} for message in record.messages]
    return {
        "response": answer.text,
        "labels": record.extra.get("response"),
        "logprobs": None,
        "messages": [*messages, {"role": "assistant", "content": answer.text}],
        "finish_reason": answer.finish_reason,
        "source": record.source,
    }
