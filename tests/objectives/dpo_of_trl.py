"""What TRL computes for four pairs of two tiny models; dpo_of_trl.json was written by this file in an environment that has TRL 1.16.0.

OMP_NUM_THREADS=1 python -m tests.objectives.dpo_of_trl > tests/objectives/dpo_of_trl.json
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.tiny import make_model

BETA = 0.3
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "two losses": {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.8, 0.5]},
}


def make_models(folder: Path) -> tuple[Path, Path]:
    """(policy, reference): random models that differ in every weight, and far enough from uniform to tell answers apart."""
    policy, reference = (make_model(folder / name, seed=seed, initializer_range=0.2) for name, seed in (("policy", 1), ("reference", 0)))
    return policy, reference


def pairs() -> list[dict[str, list[int]]]:
    """Prompts of 20 to 23 tokens, answers of other lengths than each other."""
    return [
        {
            "prompt": [5 + (7 * i + 3 * j) % 300 for j in range(20 + i)],
            "chosen": [*(5 + (11 * i + 5 * j) % 300 for j in range(6 + 3 * i)), 2],
            "rejected": [*(5 + (13 * i + 17 * j) % 300 for j in range(11 - 2 * i)), 2],
        }
        for i in range(4)
    ]


def of_trl(folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Loss, norm of its gradient and metrics of all pairs in one padded batch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    paths = make_models(folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in paths)
    common: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None}
    trainer = DPOTrainer(
        policy,
        reference,
        args=DPOConfig(output_dir=str(folder / "out"), beta=BETA, **common, **options),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(paths[0]),
    )
    batch = trainer.data_collator([{f"{name}_ids": ids for name, ids in pair.items()} for pair in pairs()])
    loss = trainer._compute_loss(policy.train(), batch, False)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in policy.parameters()])
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    return {"loss": float(loss), "grad_norm": float(norm), **{name: trainer._metrics["train"][name][-1] for name in names}}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps({name: of_trl(Path(place), options) for name, options in CASES.items()}, indent=1))
