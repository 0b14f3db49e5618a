"""A training loop as small as can be, around a real tuner, a real optimizer and a real strategy."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from swift.config.commands import SftConfig
from swift.config.options import build
from swift.model.load import Quantization, load_model
from swift.model.noise import add_noise
from swift.parallel.single import Single
from swift.train.optim import make_optimizer
from swift.tuner import TUNERS
from tests.tiny import make_model

BATCH = torch.arange(4, 84).reshape(4, 20) * 7 % 300 + 4
PROBE = torch.arange(10, 40)[None]


@dataclass
class Tuned:
    """A model with its tuner, and what trains it."""

    model: Any
    tuner: Any
    config: SftConfig
    strategy: Single
    step: int = 0

    def train(self, steps: int) -> list[float]:
        self.model.train()
        losses = []
        for _ in range(steps):
            torch.manual_seed(self.step)
            logits = self.model(input_ids=BATCH).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), BATCH[:, 1:].flatten())
            self.strategy.backward(loss)
            self.strategy.clip_and_step(1.0)
            self.step += 1
            losses.append(float(loss.detach()))
        return losses

    def save(self, path: Path) -> Path:
        path.mkdir()
        self.tuner.save(self.model, path, max_shard_size="5GB")
        self.strategy.save(path / "optimizer.pt")
        return path

    def load(self, path: Path, step: int) -> None:
        self.tuner.load(self.model, path)
        self.strategy.load(path / "optimizer.pt")
        self.step = step

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


def tune(path: Path, *, total_steps: int = 6, seed: int = 1, **options: Any) -> Tuned:
    given = {"model": str(path), "dataset": "d", "learning_rate": 1e-2, "weight_decay": 0.0, "lora_dropout": 0.0, "seed": seed} | options
    if "lora_dropout" not in options and options.get("tuner_type", "lora") not in ("lora", "adalora"):
        del given["lora_dropout"]
    config = build(SftConfig, ("argument", given))
    quantization = Quantization(config.quant_bits or 4, torch.float32, config.bnb_4bit_quant_type) if config.quant_method else None
    model = load_model(path, quantization=quantization).model if quantization else copy.deepcopy(base(path))
    if config.neftune_noise_alpha:
        add_noise(model, config.neftune_noise_alpha)
    torch.manual_seed(seed)
    tuner = TUNERS.get(config.tuner_type)()
    model = tuner.apply(model, config, total_steps=total_steps)
    strategy = Single(torch.device("cpu"))
    _, optimizer = strategy.prepare(model, lambda model: make_optimizer(model, config, lorap_lr_ratio=config.lorap_lr_ratio))
    tuned = Tuned(model, tuner, config, strategy)
    tuner.attach(model, optimizer, lambda: tuned.step)
    return tuned


@functools.cache
def base(path: Path) -> Any:
    """The model as it is loaded; each test gets a copy."""
    return load_model(path).model


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=PROBE).logits


def plain(path: Path) -> Any:
    hf_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("two") / "model", hidden_size=64, attention_bias=True)


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 64, because bitsandbytes packs blocks of 64 weights."""
    return make_model(tmp_path_factory.mktemp("four") / "model", num_hidden_layers=4, hidden_size=64)
