"""The engine over openvino-genai's continuous batching: requests in, tokens out, on a CPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from swift import console
from swift.engine.base import Delta, FinishReason, Request
from swift.engine.openvino import library
from swift.engine.openvino.convert import Converted, converted
from swift.engine.outside import Answer, Taker
from swift.engine.source import Source
from swift.errors import ModelError

BLOCK = 32  # tokens of a block of keys and values, as OpenVINO has it on a CPU


@dataclass(frozen=True)
class Format:
    """How weights lie on disk, OpenVINO's name for the type of keys and values and its bytes, and whether activations are rounded."""

    weights: str
    cache: str
    cache_bytes: int
    rounds_activations: bool = False


ACTIVATIONS = 32  # that share a scale where they are rounded
FORMATS = {
    "fp32": Format("fp32", "f32", 4),
    "fp16": Format("fp16", "f16", 2),
    "int8": Format("int8", "f16", 2),
    "w8a8": Format("int8", "f16", 2, rounds_activations=True),
}
REASONS: dict[str, FinishReason] = {"STOP": "stop", "LENGTH": "length"}
KNOWN = frozenset("min_new_tokens temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty seed".split())


def properties(kind: Format, num_threads: int) -> dict[str, str | int]:
    """What OpenVINO's plugin for processors is told."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": kind.cache,
        "INFERENCE_NUM_THREADS": num_threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": ACTIVATIONS if kind.rounds_activations else 0,
    }


class OpenVinoEngine:
    """Continuous batching over a paged cache. Logits and keys are float32 with fp32 weights, so answers are those of transformers."""

    def __init__(self, source: Source, model: Converted, *, num_threads: int) -> None:
        genai = library("openvino_genai")

        config = source.config
        self.max_model_len = source.max_model_len
        if model.window is not None and model.window < self.max_model_len:
            raise ModelError(
                f"OpenVINO's attention sees everything, that of this model {model.window} tokens",
                hint=f"--max_model_len {model.window}, or --infer_backend native",
            )
        kind = FORMATS[config.openvino_weight_format]
        if kind.rounds_activations and not has_vnni():
            console.say(f"this processor has no VNNI: {config.openvino_weight_format} computes what int8 does")
        num_blocks = int(config.kv_cache_gib * 2**30 / (model.values_per_token * kind.cache_bytes * BLOCK))
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = num_blocks
        scheduler.max_num_seqs = config.max_batch_size or 64
        scheduler.max_num_batched_tokens = max(config.max_num_batched_tokens, scheduler.max_num_seqs)
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = config.enable_prefix_caching
        self._pipeline = genai.ContinuousBatchingPipeline(model.path, scheduler, "CPU", properties(kind, num_threads))
        # One block stays free: the scheduler wants one more than a sequence fills.
        self.max_model_len = min(self.max_model_len, (num_blocks - 1) * BLOCK)
        if self.max_model_len < 2:
            raise ModelError(f"--kv_cache_gib {config.kv_cache_gib} holds no two blocks of {BLOCK} tokens", hint="give it more")
        self._taker = Taker("openvino", source, KNOWN)
        self._answers: dict[str, tuple[Answer, Any]] = {}
        self._number = 0

    def add(self, request: Request) -> None:
        """See Engine."""
        ov = library("openvino")

        answer = self._taker.answer(request, self._answers, self.max_model_len)
        ids = ov.Tensor(np.array([request.prompt], dtype=np.int64))
        self._number += 1
        self._answers[request.id] = answer, self._pipeline.add_request(self._number, ids, generation_config(answer))

    @property
    def is_idle(self) -> bool:
        """See Engine."""
        return not self._answers

    def step(self) -> list[Delta]:
        """See Engine."""
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        deltas = []
        for id, (answer, handle) in list(self._answers.items()):
            tokens: list[int] = []
            ended: FinishReason | None = None if handle.get_status().name == "RUNNING" else "abort"
            while handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
                    ended = REASONS.get(output.finish_reason.name, ended)
            delta = answer.add(tokens, ended=ended)
            if delta is not None:
                deltas.append(delta)
                if delta.finish_reason is not None:
                    self.abort(id)
        return deltas

    def abort(self, id: str) -> None:
        """See Engine."""
        _, handle = self._answers.pop(id, (None, None))
        if handle is not None and handle.get_status().name == "RUNNING":
            handle.cancel()

    def close(self) -> None:
        """See Engine."""
        for id in list(self._answers):
            self.abort(id)
        self._pipeline = None


def has_vnni() -> bool:
    """Whether the processor multiplies bytes, without which OpenVINO leaves activations in float32."""
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_vnni", "avx_vnni"))


def generation_config(answer: Answer) -> Any:
    """openvino-genai's settings for ``answer``; what ends it is seen to here as well, so that the reason is known."""
    genai = library("openvino_genai")

    settled = answer.settled
    values: dict[str, Any] = {
        "max_new_tokens": answer.room,
        "min_new_tokens": min(settled.min_new_tokens, answer.room),
        "ignore_eos": settled.ignore_eos,
        "stop_token_ids": set(answer.ends),
        "do_sample": settled.temperature != 0,
        "repetition_penalty": settled.repetition_penalty,
        "presence_penalty": settled.presence_penalty,
        "frequency_penalty": settled.frequency_penalty,
    }
    if settled.temperature:
        values |= {"temperature": settled.temperature, "top_p": settled.top_p, "min_p": settled.min_p}
        values |= {"top_k": settled.top_k} if settled.top_k else {}
        values |= {"rng_seed": settled.seed % 2**32} if settled.seed is not None else {}
    config = genai.GenerationConfig(**values)
    config.set_eos_token_id(answer.own_ends[0])
    return config


def make(source: Source) -> OpenVinoEngine:
    """As the options say."""
    return OpenVinoEngine(
        source, converted(source, FORMATS[source.config.openvino_weight_format].weights), num_threads=torch.get_num_threads()
    )
