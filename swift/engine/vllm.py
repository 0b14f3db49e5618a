"""The engine over vLLM's LLMEngine, on whatever device the installed vLLM is built for."""

import json
import os
from dataclasses import replace
from typing import Any

from swift import deps
from swift.engine.base import Delta, Grammar, Logprob, Request
from swift.engine.outside import Answer, Taker, reason_of
from swift.engine.source import Source
from swift.errors import ConfigError, DataError

ADAPTER = "adapter"  # the name by which vLLM knows --adapters
KNOWN = frozenset(
    "min_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed grammar logprobs"
    " prompt_logprobs".split()
)


class VllmEngine:
    """``engine`` is an LLMEngine; ``adapter`` vLLM's request for the one adapter that all answers are computed with, or None."""

    def __init__(self, source: Source, engine: Any, *, adapter: Any = None) -> None:
        self.max_model_len = int(engine.model_config.max_model_len)
        self._engine, self._adapter = engine, adapter
        self._taker = Taker("vllm", source, KNOWN)
        self._answers: dict[str, Answer] = {}

    def add(self, request: Request) -> None:
        """See Engine."""
        library: Any = deps.require("vllm.sampling_params", extra="vllm")
        answer = self._taker.answer(request, self._answers, self.max_model_len)
        grammar = answer.settled.grammar
        try:
            params = library.SamplingParams(
                **sampling_arguments(answer),
                output_kind=library.RequestOutputKind.DELTA,
                structured_outputs=None if grammar is None else library.StructuredOutputsParams(**grammar_arguments(grammar)),
            )
            prompt = {"prompt_token_ids": list(request.prompt)}
            self._engine.add_request(request.id, prompt, params, lora_request=self._adapter)
        except ValueError as problem:
            raise DataError(f"vLLM refuses the request: {problem}") from None
        self._answers[request.id] = answer

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return not self._answers

    def step(self) -> list[Delta]:
        """See Engine."""
        deltas = []
        for output in self._engine.step() if self._engine.has_unfinished_requests() else ():
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue  # it was given up
            (made,) = output.outputs
            reason = reason_of(made.finish_reason)
            values = tuple(_logprob(token, row) for token, row in zip(made.token_ids, made.logprobs or (), strict=False))
            is_first = answer.num_tokens == 0
            delta = answer.add(made.token_ids, values, ended=reason)
            if delta is None:
                continue
            deltas.append(_with_prompt(delta, output) if is_first else delta)
            if delta.finish_reason is not None:
                del self._answers[answer.request.id]
                if reason is None:
                    self._engine.abort_request([answer.request.id])
        return deltas

    def abort(self, id: str) -> None:
        """See Engine."""
        if self._answers.pop(id, None) is not None:
            self._engine.abort_request([id])

    def close(self) -> None:
        """See Engine."""
        for id in list(self._answers):
            self.abort(id)
        core = getattr(self._engine, "engine_core", None)
        if core is not None:
            core.shutdown()


def engine_arguments(source: Source) -> dict[str, Any]:
    """The fields of vLLM's EngineArgs that the options ask for; ConfigError for --vllm_engine_kwargs that say one of them again."""
    config = source.config
    values: dict[str, Any] = {
        "model": str(source.path),
        "dtype": config.torch_dtype or "auto",
        "seed": config.seed,
        "trust_remote_code": False,
        "disable_log_stats": True,
        "generation_config": "vllm",  # what the model's own says is settled here
        "max_model_len": config.vllm_max_model_len or config.max_model_len,
        "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
        "tensor_parallel_size": config.vllm_tensor_parallel_size,
        "pipeline_parallel_size": config.vllm_pipeline_parallel_size,
        "data_parallel_size": config.vllm_data_parallel_size,
        "enable_expert_parallel": config.vllm_enable_expert_parallel,
        "max_num_seqs": config.vllm_max_num_seqs,
        "enforce_eager": config.vllm_enforce_eager,
        "disable_custom_all_reduce": config.vllm_disable_custom_all_reduce,
        "disable_cascade_attn": config.vllm_disable_cascade_attn,
        "enable_prefix_caching": config.vllm_enable_prefix_caching,
        "quantization": config.vllm_quantization,
        "limit_mm_per_prompt": config.vllm_limit_mm_per_prompt,
        "mm_processor_cache_gb": config.vllm_mm_processor_cache_gb,
        "speculative_config": config.vllm_speculative_config,
    }
    if source.adapter is not None:
        values |= {"enable_lora": True, "max_lora_rank": config.vllm_max_lora_rank, "max_loras": 1}
    values = {name: value for name, value in values.items() if value is not None}
    extra = config.vllm_engine_kwargs or {}
    if twice := sorted(values.keys() & extra.keys()):
        raise ConfigError(
            f"--vllm_engine_kwargs says {twice[0]}, which has an option of its own", hint=f"say --vllm_{twice[0]}, or nothing"
        )
    return values | extra


def sampling_arguments(answer: Answer) -> dict[str, Any]:
    """The members of vLLM's SamplingParams for ``answer``. Stop words are looked for here: vLLM gives tokens, no text."""
    settled = answer.settled
    return {
        "max_tokens": answer.room,
        "min_tokens": min(settled.min_new_tokens, answer.room),
        "temperature": settled.temperature,
        "top_p": settled.top_p,
        "top_k": settled.top_k,
        "min_p": settled.min_p,
        "repetition_penalty": settled.repetition_penalty,
        "presence_penalty": settled.presence_penalty,
        "frequency_penalty": settled.frequency_penalty,
        "logit_bias": dict(settled.logit_bias) or None,
        "seed": settled.seed,
        "stop_token_ids": sorted(answer.ends),
        "ignore_eos": settled.ignore_eos,
        "logprobs": settled.logprobs,
        "prompt_logprobs": settled.prompt_logprobs,
        "detokenize": False,
    }


def grammar_arguments(grammar: Grammar) -> dict[str, Any]:
    """The member of vLLM's StructuredOutputsParams for ``grammar``."""
    if grammar.kind == "choice":
        return {"choice": json.loads(grammar.text)}
    return {{"json_schema": "json", "regex": "regex", "lark": "grammar"}[grammar.kind]: grammar.text}


def _logprob(token: int, row: Any) -> Logprob:
    """A row of vLLM's: token to an object with its log-probability and rank; the token that was chosen is always among them."""
    top = tuple((other, each.logprob) for other, each in sorted(row.items(), key=lambda item: item[1].rank) if other != token)
    return Logprob(token, row[token].logprob, ((token, row[token].logprob), *top) if row[token].rank == 1 else top)


def _with_prompt(delta: Delta, output: Any) -> Delta:
    rows = output.prompt_logprobs
    if rows is None:
        return delta
    tokens = output.prompt_token_ids
    values = tuple(None if row is None else _logprob(token, row) for token, row in zip(tokens, rows, strict=True))
    return replace(delta, prompt_logprobs=values, num_cached=output.num_cached_tokens or 0)


def make(source: Source) -> VllmEngine:
    """As the options say. vLLM reports what it runs to its makers, unless it is told not to."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    library: Any = deps.require("vllm", extra="vllm")
    adapter = None
    if source.adapter is not None:
        adapter = deps.require("vllm.lora.request", extra="vllm").LoRARequest(ADAPTER, 1, str(source.adapter))
    return VllmEngine(source, library.LLMEngine.from_engine_args(library.EngineArgs(**engine_arguments(source))), adapter=adapter)
