"""How training runs: steps, optimizer, schedule, precision, evaluation, saving."""

from dataclasses import dataclass

from swift.config.evaluate import TasksConfig
from swift.config.optim import OPTIMIZERS, REFUSED_OPTIMIZERS, reads_betas, reads_epsilon
from swift.config.options import Config, opt
from swift.errors import ConfigError, near

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
)


@dataclass(kw_only=True)
class StepsConfig(Config):
    """Steps, optimizer and schedule."""

    num_train_epochs: float = opt(3.0, "passes over the training rows", minimum=0)
    max_steps: int = opt(-1, "optimizer steps; overrides num_train_epochs when positive", minimum=-1)
    per_device_train_batch_size: int = opt(1, "rows in one forward pass", minimum=1)
    per_device_eval_batch_size: int = opt(1, "rows in one forward pass of evaluation", minimum=1)
    gradient_accumulation_steps: int | None = opt(None, "forward passes a step; by default as many as make 16 rows a step", minimum=1)
    learning_rate: float | None = opt(None, "peak learning rate; by default 1e-4 for lora and 1e-5 for full", minimum=0)
    lr_scheduler_type: str = opt("cosine", "schedule of the learning rate", choices=SCHEDULES)
    lr_scheduler_kwargs: dict[str, float] | None = opt(None, 'JSON object of settings of the schedule: {"num_cycles": 2}')
    warmup_ratio: float = opt(0.0, "share of the steps in which the learning rate rises", minimum=0, maximum=1)
    warmup_steps: float = opt(0, "steps in which the learning rate rises; below 1 it is a share; overrides warmup_ratio", minimum=0)
    optim: str = opt("adamw_torch_fused", f"optimizer: {', '.join(OPTIMIZERS)}", choices=OPTIMIZERS, refused=REFUSED_OPTIMIZERS)
    optimizer: str | None = opt(None, "the same as --optim, as ms-swift has it: muon, galore", choices=("muon", "galore"))
    use_galore: bool = opt(False, "the same as --optim galore_adamw: AdamW with moments of low rank (GaLore)")
    galore_rank: int = opt(128, "GaLore: rank of the moments", minimum=1)
    galore_update_proj_gap: int = opt(50, "GaLore: steps between two projections", minimum=1)
    galore_scale: float = opt(1.0, "GaLore: the update of projected weights is scaled by it", minimum=0)
    galore_proj_type: str = opt(
        "std", "GaLore: which side of the gradient is projected", choices=("std", "reverse_std", "right", "left", "full")
    )
    galore_target_modules: list[str] = opt([], "GaLore: parts of names of projected linear layers; by default all but the head")
    galore_with_embedding: bool = opt(False, "GaLore: project embeddings and head too")
    weight_decay: float = opt(0.1, "decoupled weight decay; not applied to biases and norms", minimum=0)
    adam_beta1: float = opt(0.9, "decay of AdamW's first moment", minimum=0, maximum=1)
    adam_beta2: float = opt(0.95, "decay of AdamW's second moment", minimum=0, maximum=1)
    adam_epsilon: float = opt(1e-8, "added to AdamW's denominator", minimum=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm; 0 does not clip", minimum=0)
    router_aux_loss_coef: float = opt(0.0, "mixture of experts: weight of the loss that balances the experts", minimum=0)
    neftune_noise_alpha: float | None = opt(None, "NEFTune: scale of the noise on the embeddings while training", minimum=0)
    train_dataloader_shuffle: bool = opt(True, "shuffle the rows anew in each epoch")
    average_tokens_across_devices: bool = opt(True, "divide the loss by the tokens of all devices; false is refused")

    def check(self) -> None:
        super().check()
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs == 0):
            raise ConfigError("there is nothing to train: no steps and no epochs", hint="give --num_train_epochs or --max_steps")
        if self.max_steps > 0 and self.given("num_train_epochs"):
            raise ConfigError("--num_train_epochs has no effect when --max_steps is given", hint="remove one of them")
        if self.warmup_steps and self.given("warmup_ratio"):
            raise ConfigError("--warmup_ratio has no effect when --warmup_steps is given", hint="remove one of them")
        self._check_optimizer()
        if not self.average_tokens_across_devices:
            raise ConfigError(
                "--average_tokens_across_devices false is not available: the loss is always that of the whole step", hint="remove it"
            )

    def _check_optimizer(self) -> None:
        chosen = (f"--optim {self.optim}", self.optim) if self.said("optim") else None
        for name, value, is_on in (
            ("--optimizer muon", "muon", self.optimizer == "muon"),
            ("--optimizer galore", "galore_adamw", self.optimizer == "galore"),
            ("--use_galore", "galore_adamw", self.use_galore),
        ):
            if is_on and chosen is not None and chosen[1] != value:
                raise ConfigError(f"{name} and {chosen[0]} contradict each other", hint="keep one")
            if is_on:
                chosen = (name, value)
                self.derive("optim", value, name)
        if not reads_betas(self.optim):
            self.refuse_without_effect(("adam_beta1", "adam_beta2"), f"with --optim {self.optim}")
        if not reads_epsilon(self.optim):
            self.refuse_without_effect(("adam_epsilon",), f"with --optim {self.optim}")
        if self.optim != "galore_adamw":
            names = [name for name in self.__dataclass_fields__ if name.startswith("galore_")]
            self.refuse_without_effect(names, "without --use_galore true")
        elif getattr(self, "tuner_type", "full") != "full":
            raise ConfigError("GaLore is for --tuner_type full: an adapter's weights are of low rank already", hint="say --tuner_type full")


@dataclass(kw_only=True)
class PrecisionConfig(Config):
    """Precision and memory."""

    bf16: bool | None = opt(None, "compute in bfloat16 where safe; by default when torch_dtype is bfloat16")
    fp16: bool | None = opt(None, "compute in float16 with a dynamic loss scale; by default when torch_dtype is float16")
    gradient_checkpointing: bool | None = opt(
        None, "recompute the activations of all blocks: less memory, a third slower; by default of as many as do not fit into memory"
    )
    gradient_checkpointing_kwargs: dict[str, bool] | None = opt(None, 'JSON object: {"use_reentrant": false}')
    torch_compile: bool = opt(False, "compile the blocks by torch.compile; slower to start, and no faster on a CPU")
    torch_compile_backend: str | None = opt(None, "backend of torch.compile; by default inductor; turns torch_compile on")
    torch_compile_mode: str | None = opt(
        None,
        "mode of torch.compile; turns torch_compile on",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    use_cpu: bool = opt(False, "the same as --device cpu")
    use_liger_kernel: bool = opt(False, "compute norms, rotary embeddings and feed-forward layers by Liger's kernels; needs a GPU")
    full_determinism: bool = opt(False, "choose deterministic kernels everywhere, or fail")

    def check(self) -> None:
        super().check()
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 exclude each other", hint="keep one")
        if self.gradient_checkpointing is False:
            self.refuse_without_effect(("gradient_checkpointing_kwargs",), "with --gradient_checkpointing false")
        self._check_compile()
        if self.use_cpu:
            if getattr(self, "device", None) not in (None, "cpu"):
                raise ConfigError(f"--use_cpu and --device {self.device} contradict each other", hint="keep one")  # type: ignore[attr-defined]
            self.derive("device", "cpu", "--use_cpu")

    def _check_compile(self) -> None:
        names = ("torch_compile_backend", "torch_compile_mode")
        if self.said("torch_compile") and not self.torch_compile:
            self.refuse_without_effect(names, "with --torch_compile false")
        for name in names:
            if getattr(self, name) is not None and not self.torch_compile:
                self.derive("torch_compile", True, f"--{name}")
        if self.torch_compile_mode and self.torch_compile_backend not in (None, "inductor"):
            raise ConfigError("--torch_compile_mode is for the backend inductor", hint="remove it, or --torch_compile_backend")
        if self.torch_compile and self.use_liger_kernel:
            raise ConfigError("--torch_compile and --use_liger_kernel both replace what a block computes", hint="keep one")


@dataclass(kw_only=True)
class LiveTasksConfig(TasksConfig):
    """Tasks that are evaluated while training."""

    eval_use_evalscope: bool = opt(
        False, "as ms-swift has it: evaluate the tasks of --eval_dataset while training, which happens without it"
    )

    def check(self) -> None:
        super().check()
        if not self.eval_dataset:
            if self.eval_use_evalscope:
                raise ConfigError("--eval_use_evalscope true needs tasks", hint="say --eval_dataset gsm8k")
            names = [name for name in TasksConfig.__dataclass_fields__ if name != "eval_dataset"]
            self.refuse_without_effect(names, "without --eval_dataset")
        if self.eval_use_evalscope:
            from swift import console

            console.notice(
                "--eval_use_evalscope true is not needed: swift evaluates the tasks of --eval_dataset itself;"
                " swift eval --eval_backend evalscope leaves a saved model to EvalScope"
            )


@dataclass(kw_only=True)
class RunConfig(Config):
    """Output, logging, evaluation, saving."""

    output_dir: str | None = opt(None, "where runs are kept; by default output/MODEL")
    add_version: bool = opt(True, "make a new folder vN-DATE-TIME in output_dir for each run")
    logging_steps: int = opt(5, "steps between two lines of the log", minimum=1)
    logging_first_step: bool = opt(True, "log the first step too")
    logging_dir: str | None = opt(None, "where TensorBoard files go; by default RUN/runs")
    report_to: list[str] = opt(["tensorboard"], "trackers: tensorboard, none", choices=("tensorboard", "none"))
    eval_strategy: str | None = opt(
        None, "when to evaluate; by default as save_strategy, and no without validation data or tasks", choices=("no", "steps", "epoch")
    )
    eval_steps: int | None = opt(None, "steps between evaluations; by default save_steps", minimum=1)
    eval_on_start: bool = opt(False, "evaluate before the first step too")
    save_strategy: str = opt("steps", "when to save; the end of the run always saves, except with no", choices=("no", "steps", "epoch"))
    save_steps: int = opt(500, "steps between checkpoints", minimum=1)
    save_total_limit: int | None = opt(None, "checkpoints that are kept; the best and the last always are", minimum=1)
    save_only_model: bool = opt(False, "save no optimizer state; such a checkpoint cannot be resumed")
    safe_serialization: bool = opt(True, "write safetensors; false is refused")
    max_shard_size: str = opt("5GB", "largest file of a saved full model")
    metric_for_best_model: str = opt(
        "loss",
        "evaluation metric by which the best checkpoint is chosen: loss, token_acc (of pairs rewards/accuracies, rewards/margins), or"
        " TASK_METRIC of a task of --eval_dataset,"
        " such as mmlu_acc; without validation data by default the first task's",
    )
    greater_is_better: bool | None = opt(None, "direction of that metric; by default false for losses and perplexities")
    load_best_model_at_end: bool = opt(False, "end with the best checkpoint's weights, not the last's")
    early_stop_interval: int | None = opt(None, "end after this many evaluations without a better metric", minimum=1)
    create_checkpoint_symlink: bool = opt(False, "keep links named last and best in the run directory")
    resume_from_checkpoint: str | None = opt(
        None, "go on from a run directory or checkpoint, bit for bit; options are taken from it", saved=False
    )
    resume_only_model: bool = opt(False, "take only the weights from that checkpoint, and start at step 0", saved=False)
    ignore_data_skip: bool = opt(False, "when resuming, start at the first row of the data again", saved=False)
    report_samples: int = opt(2, "rows that report.md answers before and after training", minimum=0)
    acc_strategy: str = opt("token", "accuracy that is logged", choices=("token",))
    disable_tqdm: bool = opt(False, "plain lines in place of a progress display", saved=False)
    do_train: bool = opt(True, "train; false is refused")
    do_eval: bool | None = opt(None, "the same as eval_strategy not no")
    dry_run: bool = opt(False, "check everything, print what would happen, and stop", saved=False)

    def check(self) -> None:
        super().check()
        if not self.safe_serialization:
            raise ConfigError("--safe_serialization false is not available: only safetensors are written", hint="remove it")
        if not self.do_train:
            raise ConfigError("--do_train false is not available here", hint="swift infer runs a model without training")
        if len(self.report_to) > 1 and "none" in self.report_to:
            raise ConfigError("--report_to none contradicts other trackers", hint="keep one")
        for names, when, is_off in (
            (("eval_steps",), "unless --eval_strategy is steps", self.eval_strategy in ("no", "epoch")),
            (("save_steps",), "unless --save_strategy is steps", self.save_strategy != "steps"),
            (("save_total_limit", "save_only_model", "create_checkpoint_symlink"), "with --save_strategy no", self.save_strategy == "no"),
            (("resume_only_model", "ignore_data_skip"), "without --resume_from_checkpoint", self.resume_from_checkpoint is None),
        ):
            if is_off:
                self.refuse_without_effect(names, when)
        if self.load_best_model_at_end and self.save_strategy == "no":
            raise ConfigError("--load_best_model_at_end needs checkpoints", hint="use --save_strategy steps or epoch")
        self.check_evaluation(has_tasks=bool(getattr(self, "eval_dataset", None)))

    @property
    def loss_metrics(self) -> tuple[str, ...]:
        """What is measured of validation rows."""
        return ("loss", "token_acc")

    def check_evaluation(self, *, has_tasks: bool) -> None:
        """ConfigError for evaluation that is asked for and forbidden, or a metric that nothing measures."""
        if has_tasks and (self.eval_strategy == "no" or self.do_eval is False):
            said = "--eval_strategy no" if self.eval_strategy == "no" else "--do_eval false"
            raise ConfigError(f"--eval_dataset has no effect with {said}", hint="remove one of them")
        if not has_tasks and self.metric_for_best_model.removeprefix("eval_") not in self.loss_metrics:
            metric = self.metric_for_best_model
            match = near(metric, self.loss_metrics)
            hint = (
                f"did you mean {match!r}?" if match else f"choose from: {', '.join(self.loss_metrics)}; tasks of --eval_dataset add theirs"
            )
            raise ConfigError(f"--metric_for_best_model does not know {metric!r}", hint=hint)
        if self.do_eval is False and self.eval_strategy in ("steps", "epoch"):
            raise ConfigError(f"--do_eval false contradicts --eval_strategy {self.eval_strategy}", hint="keep one")
