"""The other side of `train_step.py`: Hugging Face's Trainer with LlamaForCausalLM, in its best setting.

Run by `train_step.py` in an environment that holds torch, transformers and accelerate; it imports nothing of
bc2exp. Prints one JSON object: seconds of every step, the loss of the first, and the peak of the process.
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
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


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
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--batches", required=True, help="tokens [steps, batch, sequence + 1], .npy")
    parser.add_argument("--weights", help="a folder that LlamaForCausalLM loads; fresh ones without it")
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--norm-head", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    batches = np.load(args.batches)
    steps, batch, length = batches.shape[0], batches.shape[1], batches.shape[2] - 1
    shape = args.shape
    if args.weights:
        model = LlamaForCausalLM.from_pretrained(args.weights, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocab_size"],
                hidden_size=shape["hidden_size"],
                intermediate_size=shape["intermediate_size"],
                num_hidden_layers=shape["num_layers"],
                num_attention_heads=shape["num_heads"],
                num_key_value_heads=shape["num_heads"],
                rms_norm_eps=1e-6,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
            )
        )
    if args.norm_head:
        head = NormHead(shape["hidden_size"], shape["vocab_size"], bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
    model.config.use_cache = False
    rows = torch.from_numpy(batches.reshape(steps * batch, length + 1).astype(np.int64))

    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([sample["tokens"] for sample in samples])
        labels = tokens[:, 1:].contiguous()
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels, "shift_labels": labels}

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
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
            train_dataset=[{"tokens": row} for row in rows],
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"values": clock.seconds, "first_loss": clock.losses[0], "peak_bytes": peak}))


if __name__ == "__main__":
    main()
