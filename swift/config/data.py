"""Which rows, how they are checked, and how they become tokens."""

from dataclasses import dataclass

from swift.config.options import Config, opt

LOSS_SCALES = ("default", "last_round", "all")


@dataclass(kw_only=True)
class DataConfig(Config):
    """Data."""

    dataset: list[str] = opt([], "training data: files, folders, hub ids or snow-alerts; ID:SUBSET#N takes N rows of a subset")
    val_dataset: list[str] = opt([], "validation data, written as --dataset is")
    split_dataset_ratio: float = opt(0.0, "share of the training rows that is held out for validation", minimum=0, maximum=0.99)
    data_seed: int = opt(42, "seed of sampling, splitting and shuffling rows", minimum=0)
    dataset_shuffle: bool = opt(True, "shuffle the training rows once after reading")
    val_dataset_shuffle: bool = opt(False, "shuffle the validation rows once after reading")
    dataset_num_proc: int = opt(1, "processes that tokenize; the result does not depend on it", minimum=1)
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
