"""Objectives: what is minimised. Each returns a sum and a count; the trainer divides once, over the whole step."""

from swift.registry import Registry

OBJECTIVES = Registry("objective", {"sft": "swift.objectives.sft:Sft", "dpo": "swift.objectives.dpo:Dpo"}, group="swift.objective")
