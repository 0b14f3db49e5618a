"""The peer `transformers`: its Trainer with peft, as a user writes it down from the documentation; rows are padded.

python bench/trainer.py JOB MODEL ROWS.jsonl OUTPUT MAX_LENGTH      (with the Python of bench/peers/trl)
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

TEMPLATE = Path(__file__).resolve().parent / "chatml.jinja"


def encode(messages: list[dict[str, str]], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Tokens cut on the right, and labels of what the template marks as the assistant's."""
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"][:max_length], encoded["assistant_masks"][:max_length]
    return {"input_ids": ids, "labels": [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]}


def main(job: str, model_path: str, rows: str, output: str, max_length: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    lines = Path(rows).read_text(encoding="utf-8").splitlines()
    encoded = [encode(json.loads(line)["messages"], tokenizer, int(max_length)) for line in lines]
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32", attn_implementation="sdpa")
    if job == "lora":
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        output_dir=output,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=42,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(encoded), data_collator=collator)
    trainer.train()
    # The console shows four digits.
    logged = "".join(json.dumps(line) + "\n" for line in trainer.state.log_history)
    (Path(output) / "logging.jsonl").write_text(logged, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
