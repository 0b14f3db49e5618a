"""The engine over LMDeploy's two, TurboMind and PyTorch, which need a GPU."""

from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from swift import deps
from swift.engine.outside import Answer, Taker, reason_of
from swift.engine.source import Source
from swift.engine.streamed import Loop, Piece, StreamedEngine

KNOWN = frozenset("min_new_tokens temperature top_k top_p min_p repetition_penalty seed".split())


def engine_arguments(source: Source) -> dict[str, Any]:
    """The fields that TurbomindEngineConfig and PytorchEngineConfig share and that the options ask for."""
    config = source.config
    values: dict[str, Any] = {
        "dtype": config.torch_dtype or "auto",
        "tp": config.lmdeploy_tp,
        "session_len": config.lmdeploy_session_len or config.max_model_len,
        "cache_max_entry_count": config.lmdeploy_cache_max_entry_count,
        "quant_policy": config.lmdeploy_quant_policy,
    }
    return {name: value for name, value in values.items() if value is not None}


def sampling_arguments(answer: Answer) -> dict[str, Any]:
    """The fields of LMDeploy's GenerationConfig for ``answer``.

    The likeliest token is a sample from one, since LMDeploy's own greedy search leaves out the repetition penalty.
    """
    settled = answer.settled
    is_greedy = settled.temperature == 0
    return {
        "max_new_tokens": answer.room,
        "min_new_tokens": min(settled.min_new_tokens, answer.room),
        "do_sample": True,
        "temperature": 1.0 if is_greedy else settled.temperature,
        "top_k": 1 if is_greedy else settled.top_k,
        "top_p": 1.0 if is_greedy else settled.top_p,
        "min_p": 0.0 if is_greedy else settled.min_p,
        "repetition_penalty": settled.repetition_penalty,
        "random_seed": settled.seed,
        "stop_token_ids": sorted(answer.ends),
        "ignore_eos": settled.ignore_eos,
    }


def make(source: Source) -> StreamedEngine:
    """As the options say."""
    source.refuse_adapter("lmdeploy")
    lmdeploy: Any = deps.require("lmdeploy", extra="lmdeploy")
    core: Any = deps.require("lmdeploy.serve.core.async_engine", extra="lmdeploy")
    kind = source.config.lmdeploy_backend
    make_config = lmdeploy.TurbomindEngineConfig if kind == "turbomind" else lmdeploy.PytorchEngineConfig
    numbers = count(1)

    async def stream(answer: Answer) -> AsyncIterator[Piece]:
        config = lmdeploy.GenerationConfig(**sampling_arguments(answer))
        ready = await engine.preprocess(None, next(numbers), gen_config=config, input_ids=list(answer.request.prompt))
        async for part in engine.generate(ready):  # each holds new tokens, without the one that ends the answer
            yield part.token_ids or (), reason_of(part.finish_reason)

    loop = Loop(stream)
    engine = core.AsyncEngine(str(source.path), backend=kind, backend_config=make_config(**engine_arguments(source)))
    loop.run(lambda: engine.start_loop(loop.loop, use_async_api=True))

    def close() -> None:
        loop.close()
        engine.close()

    return StreamedEngine(Taker("lmdeploy", source, KNOWN), source.max_model_len, loop.start, close)
