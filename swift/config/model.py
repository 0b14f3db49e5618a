"""Which model, from where, in which precision, on which device."""

from dataclasses import dataclass

from swift.config.options import Config, opt
from swift.errors import ConfigError


@dataclass(kw_only=True)
class ModelConfig(Config):
    """Model."""

    model: str | None = opt(None, "the model: a path, pkg::NAME, hf::ORG/NAME, ms::ORG/NAME, or ORG/NAME; @REVISION may follow")
    model_revision: str | None = opt(None, "branch, tag or commit of the model; the same as @REVISION")
    adapters: list[str] = opt([], "a run directory or checkpoint whose adapter is put on the model")
    torch_dtype: str | None = opt(
        None,
        "precision of the weights; by default that of the checkpoint, and float32 on a CPU without fast 16-bit arithmetic",
        choices=("float32", "bfloat16", "float16"),
    )
    attn_impl: str | None = opt(None, "attention implementation of transformers, such as sdpa, eager, flash_attention_2")
    device: str | None = opt(None, "cpu, cuda, cuda:1, mps, npu; by default the best that is there")
    use_hf: bool | None = opt(None, "read a bare ORG/NAME as a Hugging Face id (true) or a ModelScope id (false)")
    hub_token: str | None = opt(None, "access token of the hub; never saved", saved=False)
    offline: bool = opt(False, "use what is cached and never ask a hub", saved=False)
    task_type: str = opt("causal_lm", "what the model is trained for", choices=("causal_lm",))
    chat_template: str | None = opt(None, "a Jinja file, or a built-in name such as chatml, in place of the model's own chat template")
    seed: int = opt(42, "seed of initialisation, dropout and sampling", minimum=0)


@dataclass(kw_only=True)
class QuantConfig(Config):
    """Quantization on load."""

    quant_method: str | None = opt(None, "quantize the frozen weights while loading: bnb (bitsandbytes)", choices=("bnb",))
    quant_bits: int | None = opt(None, "bits a weight for --quant_method: 4 or 8")
    bnb_4bit_compute_dtype: str | None = opt(
        None, "precision of the products with 4-bit weights; by default torch_dtype", choices=("float32", "bfloat16", "float16")
    )
    bnb_4bit_quant_type: str = opt("nf4", "4-bit number format", choices=("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = opt(True, "quantize the scales too: 0.4 bit a weight less")

    def check(self) -> None:
        super().check()
        if self.quant_bits is not None and self.quant_bits not in (4, 8):
            raise ConfigError(f"--quant_bits takes 4 or 8 with bitsandbytes, not {self.quant_bits}")
        if self.quant_bits is not None and self.quant_method is None:
            self.derive("quant_method", "bnb", "--quant_bits is given")
        if self.quant_method is not None and self.quant_bits is None:
            raise ConfigError("--quant_method bnb needs --quant_bits", hint="say --quant_bits 4 or --quant_bits 8")
        if self.quant_bits != 4:
            self.refuse_without_effect(
                ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"), "without --quant_bits 4"
            )
