"""Tuners: which weights are trained, and how they are saved and loaded again."""

from swift.registry import Registry

TUNERS = Registry(
    "tuner",
    {
        "lora": "swift.tuner.lora:LoraTuner",
        "adalora": "swift.tuner.adalora:AdaLoraTuner",
        "vera": "swift.tuner.peft_tuners:PeftTuner",
        "boft": "swift.tuner.peft_tuners:PeftTuner",
        "fourierft": "swift.tuner.peft_tuners:PeftTuner",
        "ia3": "swift.tuner.peft_tuners:PeftTuner",
        "llamapro": "swift.tuner.llamapro:LlamaProTuner",
        "full": "swift.tuner.full:FullTuner",
    },
    group="swift.tuner",
)
