"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bc2exp.data.batches import MicroBatch
from bc2exp.model.baichuan2 import Baichuan2
from bc2exp.parallel.shard import exchange_gradients, release_gathered, whole
from bc2exp.parallel.world import World
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train import TrainingError
from bc2exp.train.checkpoint import Checkpoints, Progress
from bc2exp.train.optimizer import set_lr
from bc2exp.train.throughput import Throughput


@dataclass(frozen=True)
class Counts:
    """What a step comes to over all ranks.

    Attributes:
        labels: labels that count.
        positions: positions of rows that hold a sample.
    """

    labels: int
    positions: int


@dataclass
class Trainer:
    """One training: `run` takes it from where it is to its last step.

    Args:
        batches: this rank's micro batches of a step (from 0).
        evaluation: this rank's share of the held-out samples; empty: nothing is evaluated.
        lr_at: learning rate of a step (from 1).
        steps: the last step.
        global_batch: samples a step.
        clip_norm: highest global gradient norm; None: no clipping.
        log_every, eval_every, save_every: in steps; the last two may be None (only at the end).
        stop_file: a person's wish to stop; looked for between steps.
    """

    model: Baichuan2
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

        A stop leaves a checkpoint of the last step done; so a run that has none does its first step.
        Raises TrainingError on a loss or gradient norm that is not finite, before the weights change.
        """
        saved = start
        self.throughput.restart()
        for step in range(start + 1, self.steps + 1):
            batch = self.batches(step - 1)
            counts, stop = self._agree(batch)
            if stop and step > 1:
                if saved < step - 1:
                    self._save(step - 1)
                return "stopped"
            lr = self.lr_at(step)
            set_lr(self.optimizer, lr)
            loss, grad_norm = self._step(step, batch, counts)
            self.throughput.count_step()
            last = step == self.steps
            if last or step % self.log_every == 0:
                self._record(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm})
            if last or (self.eval_every and step % self.eval_every == 0):
                self._evaluate(step)
            if last or (self.save_every and step % self.save_every == 0):
                self._save(step)
                saved = step
        return "done"

    def _agree(self, batch: list[MicroBatch]) -> tuple[Counts, bool]:
        """The counts of the step over all ranks, and whether to stop before it. One exchange."""
        labels = sum(part.num_labels for part in batch)
        positions = sum(row >= 0 for part in batch for row in part.samples) * batch[0].input_ids.shape[1]
        stop = self.world.rank == 0 and self.stop_file.exists()
        mine = torch.tensor([labels, positions, int(stop)], device=self.world.device)
        labels, positions, stops = (int(count) for count in self.world.sum(mine).tolist())
        return Counts(labels, positions), stops > 0

    def _step(self, step: int, batch: list[MicroBatch], counts: Counts) -> tuple[float, float]:
        """One optimizer step: loss (mean over the labels of all ranks) and gradient norm before clipping."""
        # Sharded gradients are averaged over the ranks, so the factor makes of that a mean over labels.
        scale = self.world.size / max(1, counts.labels)
        if self.model.lm_head is not None:
            self.model.lm_head.z_loss_ratio = counts.labels / max(1, counts.positions)
        losses = []
        for part in batch:
            exchange_gradients(self.model, now=part is batch[-1])
            loss = loss_sum(self.model, part, self.world.device)
            (loss * scale).sum().backward()
            losses.append(loss.detach().float())
        total = self.world.sum(torch.cat(losses).sum()).item() / max(1, counts.labels)
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
        every = [part.samples for part in batch]
        mine = [part for part, value in zip(every, losses, strict=True) if not math.isfinite(value.item())]
        found = self.world.gather((mine, every))
        parts = [part for mine, _ in found for part in mine] or [part for _, every in found for part in every]
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
        if self.evaluation:
            self.journal.metrics(step, {"eval/loss": evaluate(self.model, self.evaluation, self.world)})
        self.throughput.restart()

    def _save(self, step: int) -> None:
        path = self.checkpoints.save(self.model, self.optimizer, Progress(step, step * self.global_batch))
        self.journal.event("checkpoint", step=step, path=f"{path.parent.name}/{path.name}")
        self.throughput.restart()


def loss_sum(model: nn.Module, part: MicroBatch, device: torch.device) -> torch.Tensor:
    """The loss sum of a micro batch, fp32 [1]."""
    segments = None if part.segment_ids is None else part.segment_ids.to(device)
    loss: torch.Tensor = model(part.input_ids.to(device), segments, part.labels.to(device))
    return loss


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[MicroBatch], world: World) -> float:
    """Mean loss over all labels of all ranks' batches; changes nothing. Every rank must call it."""
    model.eval()
    losses = [loss_sum(model, part, world.device) for part in batches]
    release_gathered(model)
    model.train()
    # Summed on the host: fp32 loses count beyond 2^24 labels, and a device may have nothing wider.
    mine = torch.cat(losses).cpu().double().sum().item()
    found = world.gather((mine, sum(part.num_labels for part in batches)))
    return float(sum(loss for loss, _ in found) / max(1, sum(labels for _, labels in found)))
