"""Tuners: which weights are trained, and how they are saved and loaded again."""

from swift.registry import Registry

TUNERS = Registry("tuner", {"lora": "swift.tuner.lora:LoraTuner", "full": "swift.tuner.full:FullTuner"}, group="swift.tuner")
