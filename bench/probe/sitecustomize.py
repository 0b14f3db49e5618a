"""Watches a training process from outside its program: when it starts to compute, and when its optimizer steps.

Python imports a module of this name by itself when its folder is on PYTHONPATH. It does nothing until the process
imports torch; then it registers torch's global hooks, which every torch program passes through, whoever wrote it:

* the first embedding looked up with gradients on = the first forward pass of training (that hook then removes itself);
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
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    record: dict[str, Any] = {"steps": []}

    def now() -> dict[str, float]:
        return {"at_s": time.monotonic() - launched_at, "cpu_s": time.process_time()}

    def before_forward(module: Any, _args: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and torch.is_grad_enabled():
            record["first_forward"] = now()
            handle.remove()

    def before_step(*_: Any) -> None:
        record["steps"].append({"begin": now()})

    def after_step(*_: Any) -> None:
        record["steps"][-1]["end"] = now()
        path = os.path.join(directory, f"{os.getpid()}.json")
        with open(path + ".part", "w", encoding="ascii") as file:
            json.dump(record, file)
        os.replace(path + ".part", path)

    handle = register_module_forward_pre_hook(before_forward)
    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)


class _AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as usual, and starts to watch as soon as its module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            self.real_loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real_loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.real_loader
        self.real_loader.exec_module(module)
        _watch(os.environ["SWIFT_PROBE_DIR"], float(os.environ["SWIFT_PROBE_START"]))


if "SWIFT_PROBE_DIR" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())
