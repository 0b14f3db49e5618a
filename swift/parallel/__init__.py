"""Strategies: how a step is spread over devices."""

from swift.registry import Registry

STRATEGIES = Registry(
    "strategy",
    {"single": "swift.parallel.single:Single", "megatron": "swift.parallel.megatron.strategy:Megatron"},
    group="swift.strategy",
)
