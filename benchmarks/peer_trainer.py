"""The other side of `train_step.py` and `finetune.py`: Hugging Face's Trainer with LlamaForCausalLM.

Run by them in an environment that holds torch, transformers and accelerate; it imports nothing of bc2exp.
Prints one JSON object: seconds of every step, the loss of the first, and the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class NormHead(nn.Linear):
    """A head whose rows are divided by their lengths, as Baichuan2's: what plain Llama does not do."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits."""
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


class Clock(TrainerCallback):
    """Seconds of every step, and the losses."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self._begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        self.seconds.append(time.perf_counter() - self._begin)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """The Trainer tells its numbers."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    """Train some steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", required=True, help=".npz of ids, labels, and the lengths of the rows")
    parser.add_argument("--batch", type=int, required=True, help="rows a step")
    parser.add_argument("--micro-batch", type=int, help="rows of a forward pass; all by default")
    parser.add_argument("--length", type=int, help="what rows are padded to; the longest by default")
    parser.add_argument("--weights", required=True, help="a folder that LlamaForCausalLM loads")
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--norm-head", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    given = np.load(args.rows)
    ends = np.cumsum(given["lengths"])[:-1]
    ids, labels = (
        [torch.from_numpy(row) for row in np.split(given[name], ends)] for name in ("ids", "labels")
    )
    micro_batch = args.micro_batch or args.batch
    model = LlamaForCausalLM.from_pretrained(args.weights, dtype=torch.float32)
    if args.norm_head:
        head = NormHead(model.config.hidden_size, model.config.vocab_size, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
    model.config.use_cache = False

    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        length = args.length or max(len(sample["ids"]) for sample in samples)
        padded = torch.zeros(len(samples), length, dtype=torch.int64)
        wanted = torch.full((len(samples), length), -100)
        for row, sample in enumerate(samples):
            padded[row, : len(sample["ids"])] = sample["ids"]
            wanted[row, : len(sample["ids"])] = sample["labels"]
        # Padding stands behind the text, where causal attention never looks: no mask, which would cost.
        return {"input_ids": padded, "labels": wanted, "shift_labels": wanted}

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=len(ids) // args.batch,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=args.batch // micro_batch,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                train_sampling_strategy="sequential",
                **args.settings,
            ),
            train_dataset=[{"ids": row, "labels": wanted} for row, wanted in zip(ids, labels, strict=True)],
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"values": clock.seconds, "first_loss": clock.losses[0], "peak_bytes": peak}))


if __name__ == "__main__":
    main()
