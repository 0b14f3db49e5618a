"""llama.cpp in a process of its own, for `quality.py`: logits of texts, and tokens per CPU second. Its own Python runs this.

    python llamacpp.py model.gguf job.json

The job names `pieces` (token ids), `logits` (the file that they go to: float32, tokens of all pieces times vocabulary), `batch`
(numbers of answers at once), `prompt` and `answer` (tokens of each) and `threads`. One line of JSON comes out: tokens per CPU
second of each batch.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

UBATCH = 512  # tokens of one pass, as its server has it
CACHE_TOKENS = 512  # of a sequence


class Context:
    """A model with room for ``sequences`` at once, with the settings that its server has by itself."""

    def __init__(self, model: Any, sequences: int, threads: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = sequences * CACHE_TOKENS, UBATCH, UBATCH
        settings.n_seq_max, settings.kv_unified = sequences, False
        settings.n_threads = settings.n_threads_batch = threads
        self.here = llama_cpp.llama_init_from_model(model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(UBATCH, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One pass over at most UBATCH tokens: (token, position, sequence, whether its logits are wanted)."""
        self.batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[at], self.batch.pos[at] = token, position
            self.batch.n_seq_id[at], self.batch.seq_id[at][0], self.batch.logits[at] = 1, sequence, wanted
        status = llama_cpp.llama_decode(self.here, self.batch)
        if status != 0:
            sys.exit(f"llama_decode ended with {status}")

    def logits(self, count: int) -> np.ndarray:
        """Those of the last pass, (count, V), in the order in which they were asked for."""
        first = llama_cpp.llama_get_logits(self.here)
        return np.ctypeslib.as_array(ctypes.cast(first, ctypes.POINTER(ctypes.c_float)), (count, self.vocabulary))

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.here), True)


def write_logits(context: Context, pieces: list[list[int]], path: str) -> None:
    with open(path, "wb") as file:
        for piece in pieces:
            context.forget()
            context.decode([(token, position, 0, True) for position, token in enumerate(piece)])
            context.logits(len(piece)).tofile(file)


def speed(context: Context, batch: int, prompt: int, answer: int, seed: int) -> float:
    """Tokens per CPU second of ``batch`` greedy answers, prefill included."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(100, 40000, (batch, prompt)).tolist()
    context.forget()
    begin = time.process_time()
    last = [0] * batch
    rows = [(token, at, number, at == prompt - 1) for number in range(batch) for at, token in enumerate(prompts[number])]
    for first in range(0, len(rows), UBATCH):
        part = rows[first : first + UBATCH]
        context.decode(part)
        ended = [number for _, _, number, wanted in part if wanted]
        for number, best in zip(ended, context.logits(len(ended)).argmax(-1) if ended else (), strict=True):
            last[number] = int(best)
    for step in range(answer - 1):
        context.decode([(last[number], prompt + step, number, True) for number in range(batch)])
        last = context.logits(batch).argmax(-1).tolist()
    return batch * answer / (time.process_time() - begin)


def main() -> None:
    with open(sys.argv[2], encoding="utf-8") as file:
        job = json.load(file)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"{sys.argv[1]}: llama.cpp does not load it")
    if job["pieces"]:
        write_logits(Context(model, 1, job["threads"]), job["pieces"], job["logits"])
    found = {}
    for batch in job["batch"]:
        context = Context(model, batch, job["threads"])
        speed(context, batch, job["prompt"], 4, 0)
        found[batch] = max(speed(context, batch, job["prompt"], job["answer"], seed) for seed in (1, 2, 3))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
