"""What a model is exported to, and how its weights are quantized on the way."""

import re
from dataclasses import dataclass

from swift.config.model import ModelConfig
from swift.config.options import Config, opt
from swift.errors import ConfigError

TARGETS = ("gguf", "ollama", "onnx", "openvino", "tensorrt", "tensorrt_llm", "mcore")
GGUF_TYPES = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k_m",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
)
METHODS = ("gptq", "awq", "fp8", "int8", "bnb")
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "fp8": (8,), "int8": (8,), "bnb": (4, 8)}
FORMATS = {
    "gptq": ("gptq", "gptq_v2", "compressed-tensors"),
    "awq": ("awq", "compressed-tensors"),
    "fp8": ("compressed-tensors", "fp8"),
    "int8": ("compressed-tensors",),
    "bnb": ("bnb",),
}
READ_BY_TO_HF = (
    *("to_hf", "mcore_model", "model", "model_revision", "use_hf", "hub_token", "offline"),
    *("torch_dtype", "output_dir", "exist_ok", "max_shard_size"),
)
BNB_OPTIONS = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclass(kw_only=True)
class CalibrationConfig(Config):
    """Calibration."""

    dataset: list[str] = opt([], "rows to calibrate with, written as for sft; by default a built-in text in several languages")
    columns: dict[str, str] | None = opt(None, 'JSON object that renames columns before a row is read: {"mine": "query"}')
    use_chat_template: bool | None = opt(None, "render messages by the chat template; by default true where the model has one")
    system: str | None = opt(None, "system message for rows without one: a text, or a .txt file that holds it")
    max_length: int = opt(512, "tokens of a document of the calibration; longer ones are cut into several", minimum=16)
    quant_n_samples: int = opt(256, "documents to calibrate with", minimum=1)
    quant_batch_size: int | None = opt(None, "documents of one forward pass; by default as many as have some 1,024 tokens", minimum=1)
    quant_eval_samples: int = opt(16, "further documents, which measure what was lost; 0 measures nothing", minimum=0)
    data_seed: int = opt(42, "seed of the choice of documents", minimum=0)


@dataclass(kw_only=True)
class QuantizeOptions(Config):
    """Quantization."""

    quant_method: str | None = opt(
        None,
        "gptq or awq (few bits, calibrated), fp8 or int8 (8 bits for weights and activations), bnb (bitsandbytes); "
        "gptq_v2 is gptq in the format of that name",
        choices=(*METHODS, "gptq_v2"),
        refused=dict.fromkeys(
            ("hqq", "eetq", "quanto"), "it quantizes while loading, and few engines read what it saves; bnb is of its kind"
        ),
    )
    quant_bits: int | None = opt(None, "bits a weight; by default 4, and 8 with fp8 and int8", minimum=2, maximum=8)
    quant_format: str | None = opt(
        None,
        "the checkpoint: gptq, gptq_v2, awq, compressed-tensors, fp8 or bnb; by default the one that is called as the method is, "
        "and gptq_v2 with --sym false",
    )
    group_size: int = opt(
        128, "inputs that share a scale, -1 for all of a row; made smaller where widths are no multiple of it", minimum=-1
    )
    sym: bool = opt(True, "numbers on both sides of zero alike, without a zero point (gptq); awq always has one")
    desc_act: bool = opt(
        False, "make groups of the inputs in their order of importance, and write that order (g_idx): slower kernels; without it only "
        "the order of rounding follows importance"
    )  # fmt: skip
    damp_percent: float = opt(0.01, "share of the mean diagonal that is added to the Hessian (gptq)", minimum=0, maximum=1)
    quant_strategy: str | None = opt(
        None, "weights that share a scale, with fp8 and int8: the tensor, a channel (default) or a block of 128 x 128 (fp8)",
        choices=("tensor", "channel", "block"),
    )  # fmt: skip
    quant_activations: str = opt(
        "dynamic", "scales of activations with fp8 and int8: found for each token while running, or static, from the calibration",
        choices=("dynamic", "static"),
    )  # fmt: skip
    bnb_4bit_compute_dtype: str | None = opt(
        None, "precision that readers of 4-bit weights compute in; by default that of the model", choices=("float32", "bfloat16", "float16")
    )
    bnb_4bit_quant_type: str = opt("nf4", "4-bit number format of bitsandbytes", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = opt(True, "quantize the scales of bitsandbytes too: 0.4 bit a weight less")
    quant_skip: list[str] = opt([], "modules that stay as they are: regular expressions searched for in their names; the head always does")
    max_kl: float | None = opt(None, "largest divergence from the original in nats a token; more fails, and nothing is written", minimum=0)


@dataclass(kw_only=True)
class ExportFormatConfig(Config):
    """Format."""

    to: str | None = opt(None, f"what is written: {', '.join(TARGETS)}, or what a plug-in brings")
    to_ollama: bool = opt(False, "the same as --to ollama")
    to_mcore: bool = opt(False, "the same as --to mcore: a checkpoint that Megatron-LM trains on")
    to_hf: bool = opt(False, "make safetensors of the Megatron checkpoint that --mcore_model names")
    mcore_model: str | None = opt(None, "with --to_hf: folder of a distributed checkpoint (torch_dist) of Megatron-Core")
    gguf_type: str = opt("f16", "number format of a GGUF file; names with k need the extra llamacpp", choices=GGUF_TYPES)
    onnx_layout: str = opt(
        "transformers",
        "inputs and outputs as optimum names them (transformers), or onnxruntime-genai's folder",
        choices=("transformers", "genai"),
    )
    onnx_precision: str = opt("fp32", "weights of an ONNX model", choices=("fp32", "fp16", "int4"))
    openvino_weight_format: str = opt("fp16", "weights of an OpenVINO model", choices=("fp32", "fp16", "int8"))
    tensorrt_tp_size: int = opt(1, "GPUs that share each layer of a TensorRT-LLM checkpoint (tensor parallelism)", minimum=1)
    tensorrt_pp_size: int = opt(1, "groups of GPUs that share its layers (pipeline parallelism)", minimum=1)
    tensorrt_llm_quant_algo: str | None = opt(
        None, "weights that trtllm-build rounds to 8 bits (W8A16) or 4 (W4A16); without it they stay in 16", choices=("W8A16", "W4A16")
    )
    tensorrt_library: str = opt(
        "tensorrt", "what an engine is for: TensorRT (built on the GPU that will run it), or TensorRT for RTX (built without a GPU too)",
        choices=("tensorrt", "rtx"),
    )  # fmt: skip
    tensorrt_precision: str = opt("fp16", "numbers that a TensorRT engine computes with", choices=("fp32", "fp16", "bf16"))
    tensorrt_compute_capability: list[str] = opt(
        [], "GPUs that an engine of TensorRT for RTX is built for, such as 8.6 8.9; by default that of this machine, or all"
    )
    tensorrt_max_batch_size: int = opt(8, "most texts at once that a TensorRT engine is built for", minimum=1)
    tensorrt_max_input_len: int = opt(1024, "most new tokens of a text at once that a TensorRT engine is built for", minimum=1)
    tensorrt_max_seq_len: int = opt(2048, "longest text in tokens, with what came before, that a TensorRT engine is built for", minimum=2)


@dataclass(kw_only=True)
class PushConfig(Config):
    """Upload."""

    push_to_hub: bool = opt(False, "upload what was written, with a model card that carries the report")
    hub_model_id: str | None = opt(None, "ORG/NAME to upload to, on the hub that --use_hf says; hf::ORG/NAME or ms::ORG/NAME")
    hub_private_repo: bool = opt(False, "make a private repository, if it does not exist")
    commit_message: str = opt("update files", "message of the upload")


@dataclass(kw_only=True)
class ExportConfig(PushConfig, ExportFormatConfig, QuantizeOptions, CalibrationConfig, ModelConfig):
    """Quantize a model, or write it in another format; an adapter is merged into the weights first."""

    output_dir: str | None = opt(None, "where it goes; by default beside the model, with the format in its name")
    exist_ok: bool = opt(False, "replace an output_dir that exists, once the new one is whole")
    merge_lora: bool | None = opt(
        None, "merge the adapter of --adapters; that happens by itself, but for --push_to_hub alone, which uploads an adapter as it is"
    )
    max_difference: float = opt(1e-3, "largest difference of a log-probability between adapter and merged model", minimum=0)
    max_shard_size: str = opt("5GB", "largest file of weights")
    safe_serialization: bool = opt(True, "write safetensors; false is refused")
    load_args: bool = opt(True, "take model and rendering options from the run that --adapters names")
    load_data_args: bool = opt(False, "calibrate with the training data of that run")

    @classmethod
    def takes_of_checkpoint(cls, name: str) -> bool:
        """How a run quantized the frozen weights while it trained is no wish for its export."""
        return super().takes_of_checkpoint(name) and name not in QuantizeOptions.__dataclass_fields__

    @property
    def merges_only(self) -> bool:
        """Whether the merged model is all that is written."""
        return self.to is None and self.quant_method is None and bool(self.adapters) and not self.uploads_only

    @property
    def uploads_only(self) -> bool:
        """Whether nothing is written: a model or an adapter is uploaded as it is."""
        return self.to is None and self.quant_method is None and self.push_to_hub and not (self.adapters and self.merge_lora)

    @property
    def takes_torch_dtype(self) -> bool:
        """Whether --torch_dtype says which numbers are written; other formats have an option of their own."""
        return self.to not in TARGETS or self.to in ("tensorrt_llm", "mcore")

    @property
    def calibrates(self) -> bool:
        """Whether numbers are chosen by what a text does to the model; otherwise text measures, and nothing else."""
        return self.quant_method not in (None, "bnb") and not (self.quant_method == "fp8" and self.quant_activations == "dynamic")

    def check(self) -> None:
        super().check()
        if self.to_ollama:
            if self.to not in (None, "ollama"):
                raise ConfigError(f"--to {self.to} and --to_ollama true ask for two things", hint="remove one of them")
            self.derive("to", "ollama", "--to_ollama is given")
        if self.to_mcore:
            if self.to not in (None, "mcore"):
                raise ConfigError(f"--to {self.to} and --to_mcore true ask for two things", hint="remove one of them")
            self.derive("to", "mcore", "--to_mcore is given")
        if self.to_hf or self.mcore_model is not None:
            self._check_to_hf()
            return
        if self.to is not None and self.quant_method is not None:
            raise ConfigError(
                f"--to {self.to} and --quant_method {self.quant_method} ask for two things",
                hint="a format has its own numbers: --gguf_type, --onnx_precision, --openvino_weight_format",
            )
        if self.quant_method is None and self.given("quant_bits"):
            raise ConfigError(f"--quant_bits {self.quant_bits} needs --quant_method", hint="say --quant_method gptq, awq, fp8, int8 or bnb")
        self._check_source()
        self.refuse_without_effect(("attn_impl",), "when exporting")
        self.refuse_without_effect(("seed",), "when exporting: --data_seed chooses the documents")
        self._check_upload()
        self._check_format()
        self._check_quantization()
        self._check_calibration()

    def _check_to_hf(self) -> None:
        """A checkpoint of Megatron's is all that is read, and safetensors are all that is written."""
        if not self.to_hf:
            raise ConfigError("--mcore_model is what --to_hf true reads", hint="say --to_hf true")
        if self.mcore_model is None:
            raise ConfigError("--to_hf true needs --mcore_model", hint="say --mcore_model FOLDER, a checkpoint of Megatron-Core")
        read = set(READ_BY_TO_HF)
        self.refuse_without_effect([name for name in type(self).__dataclass_fields__ if name not in read], "with --to_hf true")
        if not _is_size(self.max_shard_size):
            raise ConfigError(f"--max_shard_size takes a size such as 5GB, not {self.max_shard_size!r}")

    def _check_source(self) -> None:
        if not self.safe_serialization:
            raise ConfigError("--safe_serialization false is not available: only safetensors are written", hint="remove it")
        if self.model is None and not self.adapters:
            raise ConfigError("no model is given", hint="say --model PATH, or --adapters RUN")
        if len(self.adapters) > 1:
            raise ConfigError(f"--adapters takes one adapter, not {len(self.adapters)}", hint="merge one first, and give its model")
        if self.merge_lora is False and self.adapters and not self.uploads_only:
            raise ConfigError("--merge_lora false is not available: what is exported has the adapter in its weights", hint="remove it")
        if self.to is None and self.quant_method is None and not self.adapters and not self.push_to_hub:
            if self.merge_lora:
                raise ConfigError("--merge_lora true needs an adapter", hint="say --adapters RUN")
            raise ConfigError("nothing is asked for", hint="say --quant_method gptq, --to gguf, or --adapters RUN to merge an adapter")
        if not self.adapters:
            if self.merge_lora:
                self.refuse_without_effect(("merge_lora",), "without --adapters")
            self.refuse_without_effect(("max_difference", "chat_template"), "without --adapters")
        if not _is_size(self.max_shard_size):
            raise ConfigError(f"--max_shard_size takes a size such as 5GB, not {self.max_shard_size!r}")
        if self.to is not None:
            self.refuse_without_effect(("max_shard_size",), f"with --to {self.to}")
        if not self.takes_torch_dtype:
            self.refuse_without_effect(("torch_dtype",), f"with --to {self.to}")

    def _check_upload(self) -> None:
        if not self.push_to_hub:
            self.refuse_without_effect(("hub_model_id", "hub_private_repo", "commit_message"), "without --push_to_hub true")
            return
        if not self.hub_model_id:
            raise ConfigError("--push_to_hub true needs --hub_model_id", hint="say --hub_model_id ORG/NAME")
        if self.offline:
            raise ConfigError("--offline true and --push_to_hub true exclude each other", hint="remove one of them")
        if self.uploads_only:
            self.refuse_without_effect(
                ("output_dir", "exist_ok", "max_difference", "chat_template", "torch_dtype", "max_shard_size"),
                "when a model or an adapter is uploaded as it is",
            )

    def _check_format(self) -> None:
        for names, targets in (
            (("gguf_type",), ("gguf", "ollama")),
            (("onnx_layout", "onnx_precision"), ("onnx",)),
            (("openvino_weight_format",), ("openvino",)),
            (("tensorrt_library", "tensorrt_precision", "tensorrt_compute_capability"), ("tensorrt",)),
            (("tensorrt_tp_size", "tensorrt_pp_size", "tensorrt_llm_quant_algo"), ("tensorrt_llm",)),
            (("tensorrt_max_batch_size", "tensorrt_max_input_len", "tensorrt_max_seq_len"), ("tensorrt", "tensorrt_llm")),
        ):
            if self.to not in targets:
                self.refuse_without_effect(names, f"without --to {targets[0]}")
        if self.tensorrt_library != "rtx":
            self.refuse_without_effect(("tensorrt_compute_capability",), "without --tensorrt_library rtx")

    def _check_quantization(self) -> None:
        if self.quant_method == "gptq_v2":
            if self.quant_format not in (None, "gptq_v2"):
                raise ConfigError(
                    f"--quant_method gptq_v2 and --quant_format {self.quant_format} exclude each other", hint="say --quant_method gptq"
                )
            self.derive("quant_method", "gptq", "gptq_v2 is a format of gptq")
            self.derive("quant_format", "gptq_v2", "--quant_method gptq_v2")
        method = self.quant_method
        if method is None:
            own = [name for name in QuantizeOptions.__annotations__ if name not in ("quant_method", "max_kl")]
            self.refuse_without_effect(own, "without --quant_method")
            return
        if self.quant_bits is None:
            self.derive("quant_bits", 4 if 4 in BITS[method] else 8, f"--quant_method {method}")
        if self.quant_bits not in BITS[method]:
            listed = ", ".join(map(str, BITS[method]))
            raise ConfigError(f"--quant_bits takes {listed} with --quant_method {method}, not {self.quant_bits}")
        if self.group_size == 0 or (self.group_size > 0 and self.group_size % 8):
            raise ConfigError(f"--group_size takes -1 or a multiple of 8, not {self.group_size}", hint="32, 64 and 128 are usual")
        if self.quant_format is None:
            by_default, because = FORMATS[method][0], f"--quant_method {method}"
            if method == "fp8" and self.quant_strategy == "block":
                by_default, because = "fp8", "--quant_strategy block"
            elif method == "gptq" and not self.sym:
                by_default, because = "gptq_v2", "--sym false: loaders differ on the zero points of the first format"
            self.derive("quant_format", by_default, because)
        if self.quant_format not in FORMATS[method]:
            raise ConfigError(
                f"--quant_format {self.quant_format} does not hold what --quant_method {method} makes",
                hint=f"choose from: {', '.join(FORMATS[method])}",
            )
        for pattern in self.quant_skip:
            _check_pattern(pattern)
        self._check_method(method)

    def _check_method(self, method: str) -> None:
        if method not in ("gptq", "awq"):
            self.refuse_without_effect(("group_size",), f"with --quant_method {method}")
        if method != "gptq":
            self.refuse_without_effect(("sym", "desc_act", "damp_percent"), f"with --quant_method {method}")
        elif self.group_size == -1:
            self.refuse_without_effect(("desc_act",), "with --group_size -1: a single group has no order")
        if self.desc_act and self.quant_format == "compressed-tensors":
            raise ConfigError(
                "--quant_format compressed-tensors holds no order of inputs", hint="remove --desc_act, or say --quant_format gptq"
            )
        if method not in ("fp8", "int8"):
            self.refuse_without_effect(("quant_strategy", "quant_activations"), f"with --quant_method {method}")
        elif self.quant_strategy is None:
            self.derive("quant_strategy", "channel", f"--quant_method {method}")
        if method == "int8" and self.quant_strategy == "block":
            raise ConfigError("--quant_strategy block is for fp8", hint="say --quant_strategy channel")
        if self.quant_format == "fp8" and (self.quant_strategy != "block" or self.quant_activations != "dynamic"):
            raise ConfigError(
                "--quant_format fp8 holds blocks with dynamic activations",
                hint="say --quant_strategy block, or --quant_format compressed-tensors",
            )
        if method != "bnb":
            self.refuse_without_effect(BNB_OPTIONS, f"with --quant_method {method}")
        elif self.quant_bits == 8:
            self.refuse_without_effect(BNB_OPTIONS, "with --quant_bits 8")

    def _check_calibration(self) -> None:
        own = list(CalibrationConfig.__annotations__)
        if self.merges_only or self.uploads_only:
            because = "when merging" if self.merges_only else "when a model or an adapter is uploaded as it is"
            self.refuse_without_effect([*own, "max_kl", "load_data_args"], because)
            return
        if not self.calibrates:
            because = f"with --to {self.to}" if self.quant_method is None else f"with --quant_method {self.quant_method}"
            also = " and --quant_activations dynamic" if self.quant_method == "fp8" else ""
            self.refuse_without_effect(("quant_n_samples", "quant_batch_size"), f"{because}{also}, which needs no calibration")
            if self.quant_eval_samples == 0:
                self.refuse_without_effect([*own[: own.index("quant_n_samples")], "load_data_args"], "with --quant_eval_samples 0")
        if not self.dataset:
            self.refuse_without_effect(("columns", "system"), "without --dataset")
        if self.max_kl is not None and self.quant_eval_samples == 0:
            raise ConfigError("--max_kl needs something to measure with", hint="remove --quant_eval_samples 0")


@dataclass(kw_only=True)
class QuantizeConfig(ExportConfig):
    """Quantize a model: swift export with --quant_method."""

    def check(self) -> None:
        if self.quant_method is None:
            raise ConfigError("no --quant_method is given", hint="say --quant_method gptq, awq, fp8, int8 or bnb")
        super().check()


def _is_size(text: str) -> bool:
    """Whether ``text`` is such as 5GB, 500MB or 1.5GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]?i?B?", text.strip(), re.IGNORECASE)
    return found is not None and float(found[1]) > 0


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as problem:
        raise ConfigError(f"--quant_skip {pattern}: no regular expression: {problem}") from None
