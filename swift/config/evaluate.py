"""What is evaluated, on which tasks, and how."""

from dataclasses import dataclass
from typing import Any, ClassVar

from swift.config.generate import GenerateConfig
from swift.config.model import ModelConfig, QuantConfig
from swift.config.options import Config, opt
from swift.errors import ConfigError

EVALUATORS = ("native", "evalscope", "lm_eval", "opencompass", "vlmevalkit")
MODES = ("letter", "choice", "generate", "perplexity")
# As ms-swift writes them: its Native is EvalScope's own back end.
_SPELLINGS = {name.replace("_", "").replace("-", ""): name for name in EVALUATORS}
_OF_WEIGHTS = (
    "adapters torch_dtype attn_impl device chat_template quant_method quant_bits infer_backend weight_format kv_cache_gib"
    " max_num_batched_tokens enable_prefix_caching num_speculative_tokens"
).split()


@dataclass(kw_only=True)
class TasksConfig(Config):
    """Tasks."""

    eval_dataset: list[str] = opt([], "tasks: names (swift eval --list_tasks true shows them) or YAML files that declare your own")
    eval_dataset_args: dict[str, Any] | None = opt(
        None,
        'JSON object with settings of single tasks: {"mmlu": {"few_shot_num": 5, "subset_list": ["astronomy"], "local_path": DIR}}',
    )
    eval_data_dir: str | None = opt(None, "folder with the data as their authors publish them, or of folders named like the tasks")
    eval_limit: int | None = opt(None, "first examples of each category of a task; by default all", minimum=1)
    eval_mode: str | None = opt(
        None,
        "how answers are found: likeliest letter (letter), likeliest text of a choice (choice), written (generate), or"
        " the perplexity of text; by default the first that a task declares",
        choices=MODES,
    )
    eval_num_fewshot: int | None = opt(None, "solved examples before each question; by default as the task declares", minimum=0)


@dataclass(kw_only=True)
class EvalConfig(TasksConfig, GenerateConfig, QuantConfig, ModelConfig):
    """Evaluate models on tasks, one beside the other."""

    scores_first: ClassVar[bool] = True

    models: list[str] = opt([], "models, runs or checkpoints; each is compared with the first", positional=True)
    eval_output_dir: str = opt(
        "eval_output", "folder of reports and of all prompts, answers and scores; a run that was stopped goes on there"
    )
    eval_backend: str = opt("native", "what evaluates: this tool (native), or another package: evalscope, lm_eval, opencompass, vlmevalkit")
    eval_url: str | None = opt(None, "address of an OpenAI server that answers, such as http://127.0.0.1:8000/v1; for --eval_mode generate")
    eval_api_key: str | None = opt(None, "key for --eval_url", saved=False)
    eval_num_proc: int = opt(16, "requests that --eval_url or another back end has under way at once", minimum=1)
    eval_generation_config: dict[str, Any] | None = opt(
        None, 'JSON object with options of generation, as --max_new_tokens and its like: {"max_new_tokens": 512, "temperature": 0}'
    )
    extra_eval_args: dict[str, Any] | None = opt(None, "JSON object of further options, passed to the package that --eval_backend names")
    eval_baseline: list[str] = opt([], "folders of earlier reports that the models are compared with, on the same examples")
    eval_train_dataset: list[str] = opt([], "training data, written as --dataset is: examples that it contains are counted and named")
    use_chat_template: bool | None = opt(
        None, "ask in the form of the chat template; by default for written answers, if the model has a template"
    )
    system: str | None = opt(None, "system message: a text, or a .txt file that holds it; needs the chat template")
    enable_thinking: bool | None = opt(None, "passed to chat templates that know it")
    list_tasks: bool = opt(False, "print the tasks and stop")
    load_args: bool = opt(True, "take model and rendering options from the run that --adapters names")

    @classmethod
    def takes_of_checkpoint(cls, name: str) -> bool:
        """The tasks that a run evaluated while it trained are no wish for those that are asked now."""
        return super().takes_of_checkpoint(name) and name not in TasksConfig.__dataclass_fields__

    def check(self) -> None:
        super().check()
        wanted = self.eval_backend.lower().replace("_", "").replace("-", "")
        if wanted not in _SPELLINGS:
            raise ConfigError(f"--eval_backend takes {', '.join(EVALUATORS)}, not {self.eval_backend}")
        self.eval_backend = _SPELLINGS[wanted]
        if self.list_tasks:
            return
        if not self.eval_dataset:
            raise ConfigError("no task is given", hint="say --eval_dataset mmlu gsm8k; swift eval --list_tasks true shows all")
        given = [bool(self.models), self.model is not None or bool(self.adapters), self.eval_url is not None]
        if not any(given):
            raise ConfigError("no model is given", hint="swift eval MODEL --eval_dataset mmlu")
        if self.models and given[1]:
            raise ConfigError("models are given twice: by themselves and by --model or --adapters", hint="keep one")
        self._check_url()
        if self.eval_backend == "native":
            self.refuse_without_effect(("extra_eval_args",), "without --eval_backend of another package")
        else:
            self.refuse_without_effect(("eval_train_dataset",), f"with --eval_backend {self.eval_backend}, which reads its own data")
        if self.use_chat_template is False:
            self.refuse_without_effect(("system", "enable_thinking"), "without a chat template")
        self.refuse_without_effect(("logprobs", "top_logprobs", "stream", "num_beams"), "when evaluating")

    def _check_url(self) -> None:
        if self.eval_url is None:
            self.refuse_without_effect(("eval_api_key",), "without --eval_url")
            if self.eval_backend == "native":
                self.refuse_without_effect(("eval_num_proc",), "without --eval_url; --max_batch_size says how much is computed at once")
            return
        if len(self.models) > 1:
            raise ConfigError(f"--eval_url is one server, not {len(self.models)} models", hint="name the one model that it serves")
        if self.eval_mode in ("letter", "choice", "perplexity"):
            raise ConfigError(
                f"--eval_mode {self.eval_mode} needs the model itself: servers write answers and give no scores of texts",
                hint="say --eval_mode generate, or give the model without --eval_url",
            )
        self.refuse_without_effect(_OF_WEIGHTS, "with --eval_url, whose server has the model")
