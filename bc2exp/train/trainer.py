"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bc2exp.data.batches import MicroBatch
from bc2exp.parallel.shard import exchange_gradients, whole
from bc2exp.parallel.world import World
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train.checkpoint import Checkpoints, Progress
from bc2exp.train.optimizer import set_lr
from bc2exp.train.throughput import Throughput


class TrainingError(RuntimeError):
    """Training cannot go on; the sentence names the step and the samples."""


@dataclass
class Trainer:
    """One training: `run` takes it from where it is to its last step.

    Args:
        model: returns the sum of its loss, [1], for input ids and labels.
        batches: this rank's micro batches of a step (from 0).
        evaluation: this rank's share of the held-out samples; empty: nothing is evaluated.
        lr_at: learning rate of a step (from 1).
        steps: the last step.
        global_batch: samples a step.
        clip_norm: highest global gradient norm; None: no clipping.
        log_every, eval_every, save_every: in steps; the last two may be None (only at the end).
        stop_file: a person's wish to stop; looked for between steps.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    journal: Journal | NullJournal
    checkpoints: Checkpoints
    throughput: Throughput
    batches: Callable[[int], list[MicroBatch]]
    evaluation: list[MicroBatch]
    lr_at: Callable[[int], float]
    steps: int
    global_batch: int
    clip_norm: float | None
    log_every: int
    eval_every: int | None
    save_every: int | None
    stop_file: Path

    def run(self, start: int) -> str:
        """Train from after step `start`; returns `done`, or `stopped` when the stop file appeared.

        Raises TrainingError on a loss or gradient norm that is not finite, before the weights change.
        """
        saved = start
        self.throughput.restart()
        for step in range(start + 1, self.steps + 1):
            batch = self.batches(step - 1)
            num_labels, stop = self._agree(batch)
            if stop:
                if saved < step - 1:
                    self._save(step - 1)
                return "stopped"
            lr = self.lr_at(step)
            set_lr(self.optimizer, lr)
            loss, grad_norm = self._step(step, batch, num_labels)
            self.throughput.count_step()
            if step % self.log_every == 0 or step == self.steps:
                self._record(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm})
            last = step == self.steps
            if last or (self.eval_every and step % self.eval_every == 0):
                self._evaluate(step)
            if last or (self.save_every and step % self.save_every == 0):
                self._save(step)
                saved = step
        return "done"

    def _agree(self, batch: list[MicroBatch]) -> tuple[int, bool]:
        """The labels of the step over all ranks, and whether to stop before it. One exchange."""
        stop = self.world.rank == 0 and self.stop_file.exists()
        counts = torch.tensor([sum(part.num_labels for part in batch), int(stop)], device=self.world.device)
        num_labels, stops = self.world.sum(counts).tolist()
        return int(num_labels), stops > 0

    def _step(self, step: int, batch: list[MicroBatch], num_labels: int) -> tuple[float, float]:
        """One optimizer step: loss (mean over the labels of all ranks) and gradient norm before clipping."""
        # Sharded gradients are averaged over the ranks, so the factor makes of that a mean over labels.
        scale = self.world.size / max(1, num_labels)
        losses = []
        for part in batch:
            exchange_gradients(self.model, now=part is batch[-1])
            loss = self.model(part.input_ids.to(self.world.device), labels=part.labels.to(self.world.device))
            (loss * scale).sum().backward()
            losses.append(loss.detach().float())
        total = self.world.sum(torch.cat(losses).sum()).item() / max(1, num_labels)
        norm = whole(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        if not (math.isfinite(total) and math.isfinite(norm.item())):
            self._refuse(step, batch, losses, total, norm.item())
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm.item()

    def _refuse(
        self, step: int, batch: list[MicroBatch], losses: list[torch.Tensor], loss: float, norm: float
    ) -> None:
        """Raise, naming the samples: those of the micro batches whose own loss is not finite, else all."""
        mine = [part.samples for part, value in zip(batch, losses, strict=True) if not math.isfinite(value.item())]
        found = self.world.gather((mine, [part.samples for part in batch]))
        parts = [part for named, _ in found for part in named] or [part for _, every in found for part in every]
        samples = sorted(sample for part in parts for sample in part)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        raise TrainingError(
            f"step {step}: {what}; the weights were left as after step {step - 1}; "
            f"training samples {', '.join(map(str, samples))}"
        )

    def _record(self, step: int, values: dict[str, float]) -> None:
        self.world.backend.synchronize()
        memory = self.world.backend.peak_memory_bytes() / 2**30
        self.journal.metrics(step, {**values, **self.throughput.measure(), "mem/peak_gib": memory})

    def _evaluate(self, step: int) -> None:
        """Mean loss over the held-out labels of all ranks; changes nothing."""
        if self.evaluation:
            self.journal.metrics(step, {"eval/loss": evaluate(self.model, self.evaluation, self.world)})
        self.throughput.restart()

    def _save(self, step: int) -> None:
        progress = Progress(step, step * self.global_batch)
        path = self.checkpoints.save(self.model, self.optimizer, progress)
        self.journal.event("checkpoint", step=step, path=str(path))
        self.throughput.restart()


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[MicroBatch], world: World) -> float:
    """Mean loss over all labels of all ranks' batches. Every rank must call it."""
    total = torch.zeros(2, dtype=torch.float32, device=world.device)
    for part in batches:
        loss = model(part.input_ids.to(world.device), labels=part.labels.to(world.device))
        total += torch.stack((loss.float().sum(), torch.tensor(float(part.num_labels), device=world.device)))
    loss_sum, num_labels = world.sum(total).tolist()
    return float(loss_sum / max(1.0, num_labels))
