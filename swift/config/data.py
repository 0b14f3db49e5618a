"""Which rows, how they are checked, and how they become tokens."""

from dataclasses import dataclass

from swift.config.options import Config, opt
from swift.errors import ConfigError

LOSS_SCALES = ("default", "last_round", "all")
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")


@dataclass(kw_only=True)
class DataConfig(Config):
    """Data."""

    dataset: list[str] = opt([], "training data: files, folders, hub ids or snow-alerts; ID:SUBSET#N takes N rows of a subset")
    val_dataset: list[str] = opt([], "validation data, written as --dataset is")
    split_dataset_ratio: float = opt(0.0, "share of the training rows that is held out for validation", minimum=0, maximum=0.99)
    data_seed: int = opt(42, "seed of sampling, splitting and shuffling rows", minimum=0)
    dataset_shuffle: bool = opt(True, "shuffle the training rows once after reading")
    val_dataset_shuffle: bool = opt(False, "shuffle the validation rows once after reading")
    dataset_num_proc: int | None = opt(
        None, "processes that read and tokenize; by default 1, and for large data as many as cores; no result depends on it", minimum=1
    )
    streaming: bool = opt(False, "read rows while training, and never all of them; needs --max_steps")
    shuffle_buffer_size: int = opt(1000, "rows of a block when streaming: rows are shuffled inside a block", minimum=1)
    streaming_val_size: int = opt(0, "when streaming: the first rows of the first data set that are held out for validation", minimum=0)
    interleave_prob: list[float] | None = opt(
        None, "mix the data sets of --dataset by chance: the probability of each; by default they follow each other before shuffling"
    )
    stopping_strategy: str = opt(
        "first_exhausted",
        "a mixture ends when the first data set is used up (no row twice), or the last one (all_exhausted: every row at least once)",
        choices=STOPPING_STRATEGIES,
    )
    load_from_cache_file: bool = opt(True, "take tokenized rows from the cache when data, tokenizer and options are the same")
    columns: dict[str, str] | None = opt(None, 'JSON object that renames columns before a row is read: {"mine": "query"}')
    strict: bool = opt(False, "the first row that is rejected ends the command")
    max_rejected: float = opt(0.1, "share of rejected rows above which the command ends", minimum=0, maximum=1)
    model_name: list[str] = opt([], "replaces {{NAME}} in self-cognition data: one name, or a Chinese and an English one")
    model_author: list[str] = opt([], "replaces {{AUTHOR}} in self-cognition data: one name, or a Chinese and an English one")

    def check(self) -> None:
        super().check()
        if self.val_dataset:
            self.refuse_without_effect(("split_dataset_ratio",), "when --val_dataset is given")
        if not self.val_dataset and self.split_dataset_ratio == 0:
            self.refuse_without_effect(("val_dataset_shuffle",), "without validation data")
        if (max_steps := getattr(self, "max_steps", None)) is not None:
            self._check_streaming(max_steps)
            self._check_mixture()
        else:
            self.refuse_without_effect(("streaming", "interleave_prob"), "here: it is about how training takes its rows")

    def _check_streaming(self, max_steps: int) -> None:
        if not self.streaming:
            self.refuse_without_effect(("shuffle_buffer_size", "streaming_val_size"), "without --streaming true")
            return
        if max_steps <= 0:
            raise ConfigError(
                "--streaming true needs --max_steps: the number of rows is not known before they are read", hint="say --max_steps 1000"
            )
        if self.split_dataset_ratio > 0:
            raise ConfigError(
                "--split_dataset_ratio needs all rows, which --streaming true does not read before training",
                hint="hold out the first rows with --streaming_val_size, or give --val_dataset",
            )
        if self.val_dataset:
            self.refuse_without_effect(("streaming_val_size",), "when --val_dataset is given")

    def _check_mixture(self) -> None:
        probabilities = self.interleave_prob
        if probabilities is None:
            self.refuse_without_effect(("stopping_strategy",), "without --interleave_prob")
            return
        if len(probabilities) != len(self.dataset):
            raise ConfigError(
                f"--interleave_prob has {len(probabilities)} values for {len(self.dataset)} data sets",
                hint="give one for each value of --dataset, in their order",
            )
        if len(probabilities) < 2:
            raise ConfigError("--interleave_prob has no effect on a single data set", hint="remove it")
        if min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-6:
            listed = " ".join(f"{value:g}" for value in probabilities)
            raise ConfigError(
                f"--interleave_prob {listed}: the values have to be more than 0 and sum to 1", hint="for instance 0.7 0.3 for two data sets"
            )


@dataclass(kw_only=True)
class TemplateConfig(Config):
    """From rows to tokens."""

    system: str | None = opt(None, "system message for rows without one: a text, or a .txt file that holds it")
    max_length: int | None = opt(None, "longest row in tokens; by default the context length of the model", minimum=2)
    truncation_strategy: str = opt(
        "delete",
        "rows longer than max_length are rejected (delete), cut at one side, or split into several (pt only); all are counted",
        choices=("delete", "left", "right", "split"),
    )
    use_chat_template: bool | None = opt(None, "render messages by the chat template; by default true, and false for pt")
    loss_scale: str | None = opt(
        None, "what is trained: assistant turns (default), the last one (last_round), or every token (all)", choices=LOSS_SCALES
    )
    enable_thinking: bool | None = opt(None, "passed to chat templates that know it")
    padding_side: str = opt("right", "side on which shorter rows of a batch are padded", choices=("right", "left"))

    def check(self) -> None:
        super().check()
        if self.use_chat_template is False:
            self.refuse_without_effect(("enable_thinking",), "without a chat template")
