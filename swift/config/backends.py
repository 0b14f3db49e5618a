"""Options of the engines that other packages or other machines bring. Each begins with the engine's name."""

from dataclasses import dataclass
from typing import Any

from swift.config.options import Config, opt, options_of
from swift.errors import ConfigError

BACKENDS = ("native", "transformers", "openvino", "llamacpp", "remote", "vllm", "sglang", "lmdeploy")
# Options without a prefix, and the engines that know them (None: no engine was named, so it will be native or transformers).
SHARED = {
    "kv_cache_gib": ("native", "openvino", None),
    "max_num_batched_tokens": ("native", "openvino", None),
    "enable_prefix_caching": ("native", "openvino", None),
    "num_speculative_tokens": ("native", None),
    "weight_format": ("native", None),
    "num_beams": ("transformers", None),
    "logprobs": ("native", "llamacpp", "vllm", None),
    "max_batch_size": ("native", "transformers", "openvino", "llamacpp", "remote", None),
    "torch_dtype": ("native", "transformers", "vllm", "sglang", "lmdeploy", None),
    "attn_impl": ("native", "transformers", None),
    "device": ("native", "transformers", None),
    "quant_method": ("native", "transformers", None),
    "adapters": ("native", "transformers", "openvino", "vllm", None),
}


@dataclass(kw_only=True)
class BackendsConfig(Config):
    """Other engines."""

    openvino_weight_format: str = opt(
        "fp16",
        "precision of the weights; int8 is faster and a little less exact; w8a8 rounds activations too, where the processor has VNNI",
        choices=("fp32", "fp16", "int8", "w8a8"),
    )
    llamacpp_n_ctx: int | None = opt(None, "tokens of all answers under way together; by default the model's context", minimum=2)
    remote_url: str | None = opt(None, "base URL of an OpenAI endpoint, such as http://127.0.0.1:8000/v1; --model names its tokenizer")
    remote_model: str | None = opt(None, "name of the model at the endpoint; by default the only one that it serves")
    remote_api_key: str | None = opt(
        None, "key of the endpoint; @FILE reads it from a file, env:NAME from an environment variable", saved=False
    )
    remote_timeout_s: float = opt(600.0, "longest silence of the endpoint, in seconds", minimum=0.1)

    vllm_gpu_memory_utilization: float = opt(0.9, "share of a device's memory that vLLM takes", minimum=0, maximum=1)
    vllm_tensor_parallel_size: int = opt(1, "devices that share each layer", minimum=1)
    vllm_pipeline_parallel_size: int = opt(1, "groups of devices, each of which has some of the layers", minimum=1)
    vllm_data_parallel_size: int = opt(1, "copies of the model", minimum=1)
    vllm_enable_expert_parallel: bool = opt(False, "spread experts, not their parts, over the devices")
    vllm_max_model_len: int | None = opt(None, "longest prompt and answer together; the same as --max_model_len", minimum=2)
    vllm_max_num_seqs: int = opt(256, "answers computed at the same time", minimum=1)
    vllm_enforce_eager: bool = opt(False, "record no CUDA graphs: less memory, slower")
    vllm_disable_custom_all_reduce: bool = opt(False, "add up over devices by NCCL alone")
    vllm_disable_cascade_attn: bool = opt(False, "compute no common beginning of prompts apart")
    vllm_enable_prefix_caching: bool | None = opt(None, "compute the common beginning of prompts once; by default as vLLM has it")
    vllm_max_lora_rank: int = opt(16, "largest rank of an adapter, where --adapters gives one", minimum=1)
    vllm_quantization: str | None = opt(None, "how the weights are quantized; by default what the model says")
    vllm_limit_mm_per_prompt: dict[str, Any] | None = opt(None, "images, videos and so on of a prompt, as a JSON object")
    vllm_mm_processor_cache_gb: float | None = opt(None, "memory for images that were seen before, in GB", minimum=0)
    vllm_speculative_config: dict[str, Any] | None = opt(None, "how tokens are guessed, as a JSON object")
    vllm_engine_kwargs: dict[str, Any] | None = opt(None, "further fields of vLLM's EngineArgs, as a JSON object")

    sglang_tp_size: int = opt(1, "devices that share each layer", minimum=1)
    sglang_pp_size: int = opt(1, "groups of devices, each of which has some of the layers", minimum=1)
    sglang_dp_size: int = opt(1, "copies of the model", minimum=1)
    sglang_ep_size: int = opt(1, "devices over which experts are spread", minimum=1)
    sglang_mem_fraction_static: float | None = opt(None, "share of memory for weights and cache", minimum=0, maximum=1)
    sglang_context_length: int | None = opt(None, "longest prompt and answer together; the same as --max_model_len", minimum=2)
    sglang_disable_cuda_graph: bool = opt(False, "record no CUDA graphs: less memory, slower")
    sglang_quantization: str | None = opt(None, "how the weights are quantized; by default what the model says")
    sglang_kv_cache_dtype: str = opt("auto", "precision of keys and values")
    sglang_enable_dp_attention: bool = opt(False, "attention of copies, the rest of parts")
    sglang_disable_custom_all_reduce: bool = opt(False, "add up over devices by NCCL alone")
    sglang_speculative_algorithm: str | None = opt(None, "how tokens are guessed, such as EAGLE")
    sglang_speculative_num_steps: int | None = opt(None, "steps of the model that guesses", minimum=1)
    sglang_speculative_eagle_topk: int | None = opt(None, "guesses that each step goes on with", minimum=1)
    sglang_speculative_num_draft_tokens: int | None = opt(None, "guessed tokens of a step", minimum=1)

    lmdeploy_backend: str = opt("turbomind", "which of LMDeploy's two engines", choices=("turbomind", "pytorch"))
    lmdeploy_tp: int = opt(1, "devices that share each layer", minimum=1)
    lmdeploy_session_len: int | None = opt(None, "longest prompt and answer together; the same as --max_model_len", minimum=2)
    lmdeploy_cache_max_entry_count: float = opt(0.8, "share of the free memory for keys and values", minimum=0, maximum=1)
    lmdeploy_quant_policy: int = opt(0, "bits of keys and values: 4 or 8; 0 leaves them as they are", minimum=0, maximum=8)

    def check_backend(self, backend: str | None, max_model_len: int | None) -> None:
        """ConfigError for an option of an engine that is not ``backend``, or that says twice how long a sequence may be."""
        for field in options_of(type(self)):
            owner = field.name.split("_")[0]
            if owner in BACKENDS and owner != backend:
                self.refuse_without_effect((field.name,), f"without --infer_backend {owner}")
        for name, knowing in SHARED.items():
            if backend not in knowing and name in type(self).__dataclass_fields__:
                self.refuse_without_effect((name,), f"with --infer_backend {backend}")
        for name in ("vllm_max_model_len", "sglang_context_length", "lmdeploy_session_len"):
            if max_model_len is not None and getattr(self, name) not in (None, max_model_len):
                raise ConfigError(f"--{name} and --max_model_len say the same, and differ", hint="remove one of them")
        if backend == "remote" and not self.remote_url:
            raise ConfigError("--infer_backend remote needs --remote_url", hint="such as --remote_url http://127.0.0.1:8000/v1")
        if self.lmdeploy_quant_policy not in (0, 4, 8):
            raise ConfigError(f"--lmdeploy_quant_policy takes 0, 4 or 8, not {self.lmdeploy_quant_policy}")
