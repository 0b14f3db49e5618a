"""A training run, top to bottom: data, model, loop, checkpoint, report. Read this file first."""

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from swift import audit, console, hub, progress
from swift.config.commands import SftConfig
from swift.config.options import to_dict
from swift.data.collate import flat_batches, padded_batch
from swift.data.load import append_rejected, keep_rejected
from swift.errors import Interrupted, TrainingError
from swift.evaluate.live import LiveEvaluation
from swift.model.batch import Batch
from swift.model.checkpoints import adapter_folder, model_reference
from swift.model.device import choose_device
from swift.model.load import Loaded
from swift.model.norms import use_lean_norms
from swift.model.policy import probe_ids
from swift.model.tokenizer import pad_token_id
from swift.parallel.choose import Arrangement, arrange, make_policy, make_strategy, place_second
from swift.parallel.mapped import mapped_weights
from swift.parallel.world import World, join
from swift.train import checkpoint as checkpoints
from swift.train import reference as references
from swift.train import report
from swift.train.activations import choose_checkpointing, largest_pass
from swift.train.build import autocast_dtype, choose_flat, load_for_training
from swift.train.checkpoint import check_resumable, load_optimizer
from swift.train.compile import compile_blocks
from swift.train.loop import StepResult, StopRequest, add_to_window, ahead, close_window, evaluate, seed_step, train_step
from swift.train.memory import is_scarce, peak_memory_gib
from swift.train.optim import make_optimizer, make_schedule
from swift.train.prepare import (
    Data,
    advise,
    command_of,
    fill_open_options,
    objective_of,
    plan_rows,
    prepare_data,
    rows_of_a_step,
)
from swift.train.record import describe, say_farewell, what_to_resume, with_rows_dumped
from swift.train.rundir import RunDirectory, check_agreed, check_shared, new_run_path
from swift.train.state import TrainResult, TrainState
from swift.train.steps import Place, Step, Steps, passes_of, plan_steps
from swift.train.tasks import LOWER_IS_BETTER, evaluate_tasks, read_tasks, task_text
from swift.train.trackers import Trackers
from swift.tuner import TUNERS
from swift.tuner.adapter import load_adapter_weights
from swift.tuner.base import parameter_counts
from swift.tuner.fused import Fused, fuse


def train(config: SftConfig) -> TrainResult | None:
    """Run what ``config`` says; None after a dry run. Raises InputError before anything is written, if it can."""
    with join(choose_device(config.device), backend=config.ddp_backend, timeout_s=config.ddp_timeout) as world:
        return _train(config, world)


def _train(config: SftConfig, world: World) -> TrainResult | None:
    arrangement = arrange(config, world)
    if arrangement.is_sharded and config.gradient_checkpointing is None:
        config.derive("gradient_checkpointing", choose_device(config.device).type != "cpu", f"--strategy {arrangement.strategy}")
    resume_run, resume_from = what_to_resume(config)
    check_agreed(world, resume_from)
    saved = check_resumable(resume_from) if resume_from is not None and not config.resume_only_model else None
    with world.main_first():
        snapshot = hub.resolve(
            model_reference(config.model or ""), config.model_revision, use_hf=config.use_hf, token=config.hub_token, offline=config.offline
        )
        reference = references.find_reference(config, snapshot)
    fill_open_options(config, snapshot, readers=arrangement.readers)
    with world.main_first():
        data = prepare_data(config, snapshot)
    tasks = read_tasks(config, snapshot, data.tokenizer)
    fill_open_options(config, snapshot, data, metrics=tasks.metrics if tasks else (), readers=arrangement.readers)
    steps = plan_steps(config, data.rows, readers=arrangement.readers, units_per_step=rows_of_a_step(config, saved, arrangement.readers))
    advise(config, data)
    plan = plan_rows(config, snapshot, data, steps, [task_text(task) for task in tasks.tasks] if tasks else ())
    console.table(("what", "plan"), [*plan, *([("processes", f"{world.size}: {arrangement}")] if not world.is_alone else [])])
    if config.dry_run:
        return None
    path = resume_run or new_run_path(Path(config.output_dir or "output"), add_version=config.add_version)
    with RunDirectory(world.broadcast(path), owns=world.is_main) as run:
        if world.is_main:
            describe(run, config, snapshot, data, is_resumed=resume_run is not None)
        if arrangement.is_sharded:
            check_shared(run, world, choose_device(config.device))
        how: dict[str, Any] = {"world": world, "arrangement": arrangement, "resume_from": resume_from, "reference": reference}
        is_cut = arrangement.is_sharded
        with mapped_weights(world, is_needed=is_cut and is_scarce(snapshot.path, world.local_size)) as weights:
            loaded = load_for_training(config, snapshot.path, device="cpu" if is_cut else None, weights=weights)
            session = Session(config, run, data, steps, loaded, tasks, **how)
        result = session.run_to_end()
    say_farewell(config, result)
    return result


class Session:
    """One process's part of a run: the things that the loop works with, and the order of a step."""

    def __init__(
        self,
        config: SftConfig,
        run: RunDirectory,
        data: Data,
        steps: Steps,
        loaded: Loaded,
        tasks: LiveEvaluation | None = None,
        *,
        world: World,
        arrangement: Arrangement,
        resume_from: Path | None = None,
        reference: hub.Snapshot | None = None,
    ) -> None:
        self.config, self.run, self.data, self.steps, self.device = config, run, data, steps, choose_device(config.device)
        self.world = world
        self.checkpoints = checkpoints.Checkpoints(run, world, in_background=config.async_save, then=self._tidy)
        self.tokenizer, self.loaded, self.tasks = loaded.tokenizer, loaded, tasks
        self.objective = references.make_objective(config)
        self.tuner, self.is_new_best = TUNERS.get(config.tuner_type)(), False
        self.before: list[str] | None = None
        if config.report_samples and config.changes_base and world.is_main:
            self.before = report.answers(loaded.model, self.tokenizer, data, config)
        second = references.load_second_model(config, loaded, reference.path if reference else None)
        self.is_flat = all([choose_flat(config, model) for model in (loaded.model, second) if model is not None])
        dtype, (tokens, _) = autocast_dtype(config, loaded.dtype), largest_pass(config, steps, is_flat=self.is_flat)
        self.strategy = make_strategy(config, arrangement, world, self.device, dtype, tokens=tokens, is_flat=self.is_flat)
        self.rows_of = arrangement.named_reader(world.rank)
        self.reader, self.stream, self.is_split = arrangement.reader(world.rank), arrangement.stream(world.rank), self.strategy.shards
        if not config.torch_compile:
            use_lean_norms(loaded.model)
        if reference is not None and config.precompute_ref_log_probs:  # type: ignore[attr-defined]
            how: dict[str, Any] = {"cutting": steps.cutting, "strategy": self.strategy, "collate": self._collate, "world": world}
            rows = [some for some in (data.train, data.validation) if some is not None]
            references.precompute(second or loaded.model, rows, device=loaded.device, is_flat=self.is_flat, **how)
        torch.manual_seed(config.seed)
        model = self.tuner.apply(loaded.model, config, total_steps=steps.total)
        if config.adapters:
            load_adapter_weights(model, adapter_folder(config.adapters[0]))
        references.add_reference_adapter(config, model)
        if resume_from is not None:
            self.tuner.load(model, resume_from)
        whole = parameter_counts(model)
        optimizer = functools.partial(make_optimizer, config=config, lorap_lr_ratio=config.lorap_lr_ratio)
        self.model, self.optimizer = self.strategy.prepare(model, optimizer)
        self.policy = make_policy(self.strategy, self.model, config)
        self.reference = references.make_reference(config, self.policy, second, functools.partial(place_second, self.strategy))
        self.schedule = make_schedule(self.optimizer, config, steps.total)
        self.state = TrainState(max_steps=steps.total, readers=steps.cutting.readers, units_per_step=steps.cutting.units_per_step)
        self.tuner.attach(self.model, self.optimizer, lambda: self.state.global_step)
        self.fused = fuse(self.model, probe_ids(loaded.model, 8)) if config.tuner_type == "lora" and not self.is_split else Fused()
        self.optimizer.register_step_post_hook(lambda *_: self.fused.changed())
        self.checkpointing = choose_checkpointing(config, self.policy, steps, self.optimizer, self.strategy, is_flat=self.is_flat)
        if config.torch_compile:
            compile_blocks(self.policy, config, is_flat=self.is_flat)
        trainable, total = whole if self.is_split else parameter_counts(self.model)
        if resume_from is not None:
            self._resume(resume_from)
        console.say(
            f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%}) in {str(loaded.dtype).removeprefix('torch.')} "
            f"({loaded.dtype_reason}) on {self.device}; run directory {run.path}"
        )

    def run_to_end(self) -> TrainResult:
        """Train from where the run is, save, report. Raises Interrupted after a stop was asked for."""
        config, state = self.config, self.state
        if self.data.stream is not None and self.world.is_main:
            keep_rejected(self.run / "rejected.jsonl", len(self.data.rejected) + state.rejected)
        self.trackers = Trackers(
            self.run.path,
            report_to=config.report_to,
            is_explicit=config.said("report_to"),
            logging_dir=config.logging_dir,
            start=state.global_step,
            total=self.steps.total,
            plain=config.disable_tqdm,
            shown=[f"eval_{name}" for name in self.tasks.metrics] if self.tasks else (),
            writes=self.world.is_main,
        )
        with contextlib.closing(self.trackers), StopRequest(self._on_stop) as stop:
            if config.eval_on_start and state.global_step == 0:
                self._evaluate()
            self.model.train()
            self.trackers.start_clock()
            ready = self._ready_steps()
            with contextlib.closing(ready):  # type: ignore[type-var]
                for step, batches in ready if not self._is_out_of_patience() else ():
                    self._step(step, batches)
                    progress.mark(phase="stop or go on")
                    self.checkpoints.finish_if_written(self.device)
                    is_last = state.global_step == self.steps.total or self._is_out_of_patience()
                    if self.world.any(stop.is_set, self.device) and not is_last:
                        self._leave_early()
                    if is_last:
                        break
        saved = self._save() if config.save_strategy != "no" else None
        self.checkpoints.finish()
        saved = self._take_best(saved)
        self._finish(saved)
        return TrainResult(self.run.path, saved, state)

    def _step(self, step: Step, batches: list[Batch]) -> None:
        """One optimizer step and what is due after it: log, evaluation, checkpoint."""
        config, state, begin = self.config, self.state, time.monotonic()
        progress.mark(step=state.global_step + 1, phase="forward and backward")
        seed_step(config.seed, state.global_step, self.stream)
        try:
            result = train_step(
                self.policy,
                batches,
                objective=self.objective,
                strategy=self.strategy,
                max_grad_norm=config.max_grad_norm,
                reference=self.reference,
            )
        except TrainingError as problem:
            raise with_rows_dumped(problem, self.run, state.global_step + 1, step.passes, self.tokenizer, self.rows_of) from problem
        rate = self.optimizer.param_groups[0]["lr"]
        if result.was_applied:
            self.schedule.step()
        state.global_step += 1
        if self.data.stream is not None:
            state.place = asdict(step.after)
            state.rejected += append_rejected(self.run / "rejected.jsonl", step.rejected) if self.world.is_main else len(step.rejected)
        state.epoch = self.steps.epoch_at(state.global_step)
        state.train_seconds += time.monotonic() - begin
        add_to_window(state, result)
        self.trackers.step(state.global_step)
        self._after_step(result, rate, time.monotonic() - begin)

    def _after_step(self, result: StepResult, rate: float, seconds: float) -> None:
        config, state, at = self.config, self.state, self.state.global_step
        is_last = at == self.steps.total
        if at % config.logging_steps == 0 or is_last or (at == 1 and config.logging_first_step):
            values = close_window(state) | {"grad_norm": result.grad_norm, "learning_rate": rate}
            values |= {"tokens_per_s": result.tokens / seconds, f"{self.objective.items}_per_s": result.count / seconds}
            if (memory := peak_memory_gib(self.device)) is not None:
                values["memory(GiB)"] = memory
            state.log_history.append(self.trackers.log(at, state.epoch, values))
        if self.steps.is_due(config.eval_strategy, config.eval_steps, at) or (is_last and config.eval_strategy == "steps"):
            self._evaluate()
        is_best_wanted = self.is_new_best and config.load_best_model_at_end
        if self.steps.is_due(config.save_strategy, config.save_steps, at) or is_best_wanted:
            self._save()
        self.is_new_best = False

    def _evaluate(self) -> None:
        """Loss over the validation rows, and the tasks; remembers the best step."""
        values: dict[str, float] = {}
        if self.data.validation is not None:
            parts = (batch for examples in self._evaluation_passes(self.data.validation) for batch in self._collate([examples]))
            values = evaluate(self.policy, parts, objective=self.objective, strategy=self.strategy, reference=self.reference)
        if self.tasks is not None:
            progress.unwatch("evaluate tasks")
            if self.world.is_main:
                values |= evaluate_tasks(self.tasks, self.loaded, self.model, is_compiled=self.config.torch_compile)
        # Processes that share a layer may differ in the last bit. What is saved, and when a run ends, must not.
        values = self.world.broadcast(values)
        self.state.log_history.append(self.trackers.log(self.state.global_step, self.state.epoch, values))
        if self.state.global_step == 0:
            return  # what came before training is no result of it
        name = "eval_" + self.config.metric_for_best_model.removeprefix("eval_")
        is_greater_better = self.config.greater_is_better
        if is_greater_better is None:
            is_greater_better = not name.endswith(LOWER_IS_BETTER)
        best, value = self.state.best_metric, values.get(name)
        if value is None:  # no answer gave a finite one
            self.state.evaluations_without_gain += 1
        elif best is None or (value > best if is_greater_better else value < best):
            self.state.best_metric, self.state.best_step, self.state.evaluations_without_gain = value, self.state.global_step, 0
            self.is_new_best = True
        else:
            self.state.evaluations_without_gain += 1

    def _is_out_of_patience(self) -> bool:
        interval = self.config.early_stop_interval
        return interval is not None and self.state.evaluations_without_gain >= interval

    def _save(self) -> Path:
        progress.mark(phase="save")
        config = self.config
        return self.checkpoints.save(
            model=self.model,
            tokenizer=self.tokenizer,
            tuner=self.tuner,
            strategy=self.strategy,
            schedule=self.schedule,
            state=self.state,
            args=to_dict(config),
            max_shard_size=config.max_shard_size,
            only_model=config.save_only_model,
        )

    def _tidy(self, path: Path) -> None:
        """What is done when the checkpoint ``path`` is there: older ones go, links follow."""
        config = self.config
        if config.save_total_limit is not None:
            checkpoints.prune(self.run, config.save_total_limit, best_step=self.state.best_step)
        if config.create_checkpoint_symlink:
            checkpoints.link(self.run, "last", path.name)
            best = self.run / f"checkpoint-{self.state.best_step}"
            if best.exists():
                checkpoints.link(self.run, "best", best.name)

    def _resume(self, path: Path) -> None:
        if self.config.resume_only_model:
            console.say(f"weights taken from {path}, starting at step 0")
            return
        self.state = replace(check_resumable(path), readers=self.state.readers, units_per_step=self.state.units_per_step)
        load_optimizer(path, strategy=self.strategy, schedule=self.schedule)
        if self.state.max_steps != self.steps.total:
            console.warn(
                f"the run is now {self.steps.total} steps long, not {self.state.max_steps}: the learning rate follows the new length"
            )
            self.state.max_steps = self.steps.total
        console.say(f"resuming {path} at step {self.state.global_step} of {self.steps.total}")

    def _ready_steps(self) -> Iterator[tuple[Step, list[Batch]]]:
        """The steps that are left, each with its batches, prepared ahead."""
        start = Place(**self.state.place) if self.state.place else self.steps.place_at(self.state.global_step)
        steps = self.steps.iterate(Place() if self.config.ignore_data_skip else start, is_flat=self.is_flat, reader=self.reader)
        left = itertools.islice(steps, self.steps.total - self.state.global_step)
        return ahead(((step, self._collate(step.passes)) for step in left), self.config.dataloader_num_workers)

    def _collate(self, passes: Sequence[list[Any]]) -> list[Batch]:
        """The batches of a step's forward passes."""
        if self.is_flat:
            return flat_batches(passes, share=self.config.share_prefixes, root=not self.is_split)
        pad, side = pad_token_id(self.tokenizer), self.config.padding_side
        return [padded_batch(examples, pad_token_id=pad, padding_side=side) for examples in passes]

    def _evaluation_passes(self, validation: Any) -> Iterator[list[Any]]:
        """The validation rows of this reader, in forward passes; all readers have equally many."""
        cutting = replace(self.steps.cutting, rows_per_batch=self.config.per_device_eval_batch_size, packing_length=None)
        shares = cutting.shares(list(range(len(validation))), None, validation.lengths, is_flat=self.is_flat)
        return (examples for examples in passes_of(validation, shares, self.reader))

    def _take_best(self, saved: Path | None) -> Path | None:
        """With --load_best_model_at_end: the best checkpoint's weights are put back, and it is the result."""
        best = self.run / f"checkpoint-{self.state.best_step}"
        if not self.config.load_best_model_at_end or not best.exists():
            return saved
        if not self.is_split:
            self.tuner.load(self.model, best)
        return best

    def _finish(self, saved: Path | None) -> None:
        progress.unwatch("report")
        if not self.world.is_main:
            return
        planned = {"memory": self.checkpointing.facts()} if self.checkpointing else {}
        report.write(
            self.run.path,
            self.config,
            self.model,
            self.tokenizer,
            self.data,
            self.state,
            self.device,
            before=self.before,
            planned=planned,
            tasks=self.tasks.metrics if self.tasks else (),
        )
        facts = {
            "last_model_checkpoint": str(self.run.checkpoints()[-1]) if self.run.checkpoints() else None,
            "best_model_checkpoint": str(self.run / f"checkpoint-{self.state.best_step}") if self.state.best_step else None,
            "best_metric": self.state.best_metric,
            "global_step": self.state.global_step,
            "train_dataset": self.data.rows.stats(),
            "val_dataset": self.data.validation.stats() if self.data.validation else None,
        }
        self.trackers.summary(facts)
        audit.append(self.run / "audit.jsonl", "end", {"steps": self.state.global_step, "checkpoint": saved.name if saved else None})

    def _leave_early(self) -> None:
        how = f"swift {command_of(objective_of(self.config))} --resume_from_checkpoint {self.run.path}"
        if self.config.save_strategy == "no" or self.config.save_only_model:
            raise Interrupted(
                f"stopped after step {self.state.global_step}; nothing was saved to go on from",
                hint="save_strategy or save_only_model forbids it",
            )
        path = self._save()
        self.checkpoints.finish()
        raise Interrupted(f"stopped after step {self.state.global_step}; saved {path}", hint=f"{how} goes on")

    def _on_stop(self) -> None:
        console.notice("stopping after this step; press Ctrl-C again to stop at once")
