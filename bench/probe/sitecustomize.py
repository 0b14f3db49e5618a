"""Watches a training process from outside its program: when it starts to compute, what it consumes, when it steps.

Python imports a module of this name by itself when its folder is on PYTHONPATH. It does nothing until the process
imports torch; then it waits at what every torch program passes through, whoever wrote it:

* the first module called in training mode with gradients on that holds an embedding = the model, at its first forward
  pass of training. From then on its calls alone are watched: how many positions it is given (padding included), how
  many of them have a label other than -100 (only the programs that hand labels to their model show this), and in how
  many threads it computes;
* the begin and end of every ``Optimizer.step``.

Written to ``$SWIFT_PROBE_DIR/PID.json`` after each step, as seconds since ``$SWIFT_PROBE_START`` (a reading of the
monotonic clock, taken by the benchmark when it launched the command) and CPU seconds of the process so far.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def _watch(directory: str, launched_at: float) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    record: dict[str, Any] = {"steps": [], "positions": 0, "supervised": 0, "forwards": 0}
    call = torch.nn.Module.__call__

    def now() -> dict[str, float]:
        return {"at_s": time.monotonic() - launched_at, "cpu_s": time.process_time()}

    def find_model(module: Any, *args: Any, **kwargs: Any) -> Any:
        if module.training and torch.is_grad_enabled() and _holds_embedding(module):
            torch.nn.Module.__call__ = call  # type: ignore[method-assign]
            record["first_forward"] = now()
            record["threads"] = torch.get_num_threads()
            module.register_forward_pre_hook(count, with_kwargs=True)
        return call(module, *args, **kwargs)

    def count(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            input_ids, labels = kwargs.get("input_ids", args[0] if args else None), kwargs.get("labels")
            record["forwards"] += 1
            record["positions"] += 0 if input_ids is None else input_ids.numel()
            record["supervised"] += 0 if labels is None else int((labels != -100).sum())

    def before_step(*_: Any) -> None:
        record["steps"].append({"begin": now()})

    def after_step(*_: Any) -> None:
        record["steps"][-1]["end"] = now()
        path = os.path.join(directory, f"{os.getpid()}.json")
        with open(path + ".part", "w", encoding="ascii") as file:
            json.dump(record, file)
        os.replace(path + ".part", path)

    torch.nn.Module.__call__ = find_model  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)


def _holds_embedding(module: Any) -> bool:
    import torch

    return any(isinstance(part, torch.nn.Embedding) for part in module.modules())


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as usual, and starts to watch as soon as its module has run.

    It stays until then: some programs only ask whether torch can be found before they import it.
    """

    is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch" or self.is_asking:
            return None
        self.is_asking = True
        spec = importlib.util.find_spec("torch")
        self.is_asking = False
        if spec is not None and spec.loader is not None:
            self.real_loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real_loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        sys.meta_path.remove(self)
        module.__spec__.loader = module.__loader__ = self.real_loader
        self.real_loader.exec_module(module)
        _watch(os.environ["SWIFT_PROBE_DIR"], float(os.environ["SWIFT_PROBE_START"]))


if "SWIFT_PROBE_DIR" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())
