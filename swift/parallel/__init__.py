"""Strategies: how a step is spread over devices."""

from swift.registry import Registry

STRATEGIES = Registry(
    "strategy",
    {
        "single": "swift.parallel.single:Single",
        "ddp": "swift.parallel.spread:Spread",
        "fsdp2": "swift.parallel.spread:Spread",
        "deepspeed": "swift.parallel.deepspeed.strategy:DeepSpeed",
        "megatron": "swift.parallel.megatron.strategy:Megatron",
    },
    group="swift.strategy",
)
