"""The engine over SGLang's Engine, which needs a GPU that it is built for."""

import json
import re
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from swift import deps
from swift.engine.outside import Answer, Taker, reason_of
from swift.engine.source import Source
from swift.engine.streamed import Loop, Piece, StreamedEngine

KNOWN = frozenset(
    "min_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed grammar".split()
)


def engine_arguments(source: Source) -> dict[str, Any]:
    """The fields of SGLang's ServerArgs that the options ask for."""
    config = source.config
    values: dict[str, Any] = {
        "model_path": str(source.path),
        "dtype": config.torch_dtype or "auto",
        "random_seed": config.seed,
        "trust_remote_code": False,
        "log_level": "error",
        "context_length": config.sglang_context_length or config.max_model_len,
        "tp_size": config.sglang_tp_size,
        "pp_size": config.sglang_pp_size,
        "dp_size": config.sglang_dp_size,
        "ep_size": config.sglang_ep_size,
        "mem_fraction_static": config.sglang_mem_fraction_static,
        "disable_cuda_graph": config.sglang_disable_cuda_graph,
        "quantization": config.sglang_quantization,
        "kv_cache_dtype": config.sglang_kv_cache_dtype,
        "enable_dp_attention": config.sglang_enable_dp_attention,
        "disable_custom_all_reduce": config.sglang_disable_custom_all_reduce,
        "speculative_algorithm": config.sglang_speculative_algorithm,
        "speculative_num_steps": config.sglang_speculative_num_steps,
        "speculative_eagle_topk": config.sglang_speculative_eagle_topk,
        "speculative_num_draft_tokens": config.sglang_speculative_num_draft_tokens,
    }
    return {name: value for name, value in values.items() if value is not None}


def sampling_arguments(answer: Answer) -> dict[str, Any]:
    """The members of SGLang's SamplingParams for ``answer``. A choice is a regex there; a Lark grammar goes as EBNF."""
    settled = answer.settled
    values: dict[str, Any] = {
        "max_new_tokens": answer.room,
        "min_new_tokens": min(settled.min_new_tokens, answer.room),
        "temperature": settled.temperature,
        "top_p": settled.top_p,
        "top_k": settled.top_k or -1,
        "min_p": settled.min_p,
        "repetition_penalty": settled.repetition_penalty,
        "presence_penalty": settled.presence_penalty,
        "frequency_penalty": settled.frequency_penalty,
        "stop_token_ids": sorted(answer.ends),
        "ignore_eos": settled.ignore_eos,
    }
    if settled.logit_bias:
        values["logit_bias"] = {str(token): bias for token, bias in settled.logit_bias.items()}
    if settled.seed is not None:
        values["sampling_seed"] = settled.seed
    if (grammar := settled.grammar) is not None:
        text = "|".join(map(re.escape, json.loads(grammar.text))) if grammar.kind == "choice" else grammar.text
        values[{"json_schema": "json_schema", "regex": "regex", "choice": "regex", "lark": "ebnf"}[grammar.kind]] = text
    return values


def make(source: Source) -> StreamedEngine:
    """As the options say."""
    source.refuse_adapter("sglang")
    sglang: Any = deps.require("sglang", extra="sglang")
    engine = sglang.Engine(**engine_arguments(source))
    numbers = count(1)

    async def stream(answer: Answer) -> AsyncIterator[Piece]:
        prompt = list(answer.request.prompt)
        id = f"{answer.request.id}-{next(numbers)}"  # a request's name may come again
        parts = await engine.async_generate(input_ids=prompt, sampling_params=sampling_arguments(answer), stream=True, rid=id)
        known = 0
        try:
            async for part in parts:  # each holds all tokens so far
                tokens = part["output_ids"][known:]
                known += len(tokens)
                ended = part["meta_info"]["finish_reason"]
                yield tokens, reason_of(None if ended is None else ended["type"])
        finally:
            engine.tokenizer_manager.abort_request(id)

    loop = Loop(stream)

    def close() -> None:
        loop.close()
        engine.shutdown()

    return StreamedEngine(Taker("sglang", source, KNOWN), source.max_model_len, loop.start, close)
