"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from bc2exp.data.batches import MicroBatch
from bc2exp.hardware.phase import BETWEEN, EVALUATE, SAVE, TRAIN, phase
from bc2exp.parallel.layout import Layout
from bc2exp.parallel.world import World
from bc2exp.tracking.journal import Journal, NullJournal
from bc2exp.train import TrainingError
from bc2exp.train.checkpoint import Best, Checkpoints, Progress, Saved
from bc2exp.train.optimizer import AdamW, set_lr
from bc2exp.train.throughput import Throughput


@dataclass(frozen=True)
class Counts:
    """What a step comes to over all ranks.

    Attributes:
        labels: labels that count.
        positions: positions of rows that hold a sample.
        computed: all positions, padding included.
    """

    labels: int
    positions: int
    computed: int


@dataclass
class Trainer:
    """One training: `run` takes it from where it is to its last step.

    Args:
        layout: the model, laid over the ranks.
        batches: this rank's micro batches of a step (from 0).
        evaluation: this rank's share of the held-out samples; empty: nothing is evaluated.
        lr_at: learning rate of a step (from 1).
        steps: the last step.
        global_batch: samples a step.
        clip_norm: highest global gradient norm; None: no clipping.
        log_every, eval_every, save_every: in steps; the last two may be None (only at the end).
        stop_file: a person's wish to stop; looked for between steps.
        saves_beside: checkpoints are written while the training goes on; the last one never is.
        keeps_best: the checkpoint with the lowest evaluation loss is kept.
        best: which that is where the training begins.
    """

    layout: Layout
    optimizer: AdamW
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
    saves_beside: bool = False
    keeps_best: bool = False
    best: Best | None = None

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.layout.mesh.world

    @phase(BETWEEN)
    def run(self, start: int) -> str:
        """Train from after step `start`; returns `done`, or `stopped` when the stop file appeared.

        A stop leaves a checkpoint of the last step done; so a run that has none does its first step.
        Raises TrainingError on a loss or gradient norm that is not finite, before the weights change, and
        what the writing of a checkpoint raised.
        """
        try:
            return self._run(start)
        except Exception:
            # What is being written is of steps that were fine; its own fate matters less than the error.
            with suppress(Exception):
                self._await_saved()
            raise

    def _run(self, start: int) -> str:
        saved = start
        self.throughput.restart()
        for step in range(start + 1, self.steps + 1):
            self._note_saved(self.checkpoints.finished())
            batch = self.batches(step - 1)
            counts, stop = self._agree(batch)
            if stop and step > 1:
                if saved < step - 1:
                    self._save(step - 1)
                self._await_saved()
                return "stopped"
            lr = self.lr_at(step)
            set_lr(self.optimizer, lr)
            with phase(TRAIN, step):
                loss, grad_norm = self._step(step, batch, counts)
            if step == start + 1 and self.saves_beside and (self.save_every or self.keeps_best):
                self.checkpoints.make_room(self.layout, self.optimizer)
            self.throughput.count_step(counts.positions, counts.computed)
            last = step == self.steps
            if last or step % self.log_every == 0:
                self._record(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm})
            better = False
            if last or (self.eval_every and step % self.eval_every == 0):
                better = self._evaluate(step)
            if last or better or (self.save_every and step % self.save_every == 0):
                self._save(step, beside=self.saves_beside and not last)
                saved = step
        self._await_saved()
        return "done"

    def _agree(self, batch: list[MicroBatch]) -> tuple[Counts, bool]:
        """The counts of the step over all ranks, and whether to stop before it. One exchange."""
        labels = positions = computed = 0
        if self.layout.mesh.speaks_for_samples:
            labels = sum(part.num_labels for part in batch)
            positions = sum(_num_positions(part) for part in batch)
            computed = sum(part.input_ids.numel() for part in batch)
        stop = self.world.rank == 0 and self.stop_file.exists()
        mine = torch.tensor([labels, positions, computed, int(stop)], device=self.world.device)
        labels, positions, computed, stops = (int(count) for count in self.world.sum(mine).tolist())
        return Counts(labels, positions, computed), stops > 0

    def _step(self, step: int, batch: list[MicroBatch], counts: Counts) -> tuple[float, float]:
        """One optimizer step: loss (mean over the labels of all ranks) and gradient norm before clipping."""
        # Gradients are averaged over the data ranks, so the factor makes of that a mean over labels.
        scale = self.layout.mesh.num_data_ranks / max(1, counts.labels)
        if self.layout.model.lm_head is not None:
            self.layout.model.lm_head.z_loss_ratio = counts.labels / max(1, counts.positions)
        losses = self.layout.train(batch, scale)
        mine = losses.sum() if self.layout.mesh.speaks_for_loss else losses.new_zeros(())
        # One exchange tells every rank the same of both, so all go on, or none.
        sums = self.world.sum(torch.stack((mine, self.layout.finish())))
        total, norm = sums[0].item() / max(1, counts.labels), math.sqrt(sums[1].item())
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._refuse(step, batch, losses, total, norm)
        longest = norm if self.clip_norm is None else min(norm, self.clip_norm)
        self.optimizer.step(factor=longest / norm if longest < norm else 1.0)
        self.optimizer.zero_grad()
        return total, norm

    def _refuse(
        self, step: int, batch: list[MicroBatch], losses: torch.Tensor, loss: float, norm: float
    ) -> None:
        """Raise, naming the samples: those of the micro batches whose own loss is not finite, else all."""
        every = [part.samples for part in batch]
        mine = [part for part, value in zip(every, losses.tolist(), strict=True) if not math.isfinite(value)]
        found = self.world.gather((mine, every))
        parts = [part for mine, _ in found for part in mine] or [part for _, every in found for part in every]
        samples = sorted({sample for part in parts for sample in part})
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        raise TrainingError(
            f"step {step}: {what}; the weights were left as after step {step - 1}; "
            f"training samples {', '.join(map(str, samples))}"
        )

    def _record(self, step: int, values: dict[str, float]) -> None:
        self.world.backend.synchronize()
        memory = {"mem/peak_gib": self.world.backend.peak_memory_bytes() / 2**30}
        allocated = self.world.backend.peak_allocated_bytes()
        if allocated is not None:
            memory["mem/peak_allocated_gib"] = allocated / 2**30
        self.journal.metrics(step, {**values, **self.throughput.measure(), **memory})

    def _evaluate(self, step: int) -> bool:
        """Whether the weights are now the best so far, and are to be kept as such."""
        better = False
        if self.evaluation:
            with phase(EVALUATE):
                loss = evaluate(self.layout, self.evaluation)
            self.journal.metrics(step, {"eval/loss": loss})
            better = self.keeps_best and (loss < self.best.value if self.best else math.isfinite(loss))
            if better:
                self.best = Best(step, loss)
        self.throughput.restart()
        return better

    @phase(SAVE)
    def _save(self, step: int, *, beside: bool = False) -> None:
        self._await_saved()
        progress = Progress(step, step * self.global_batch, self.best)
        self.checkpoints.save(self.layout, self.optimizer, progress, beside=beside)
        if not beside:
            self._await_saved()
        self.throughput.restart()

    @phase(SAVE)
    def _await_saved(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._note_saved(self.checkpoints.finished(wait=True))

    def _note_saved(self, saved: Saved | None) -> None:
        """Record a checkpoint that has been finished."""
        if saved is None:
            return
        path = f"{saved.path.parent.name}/{saved.path.name}"
        best = self.best is not None and self.best.step == saved.step
        removed = [old.name for old in saved.removed]
        self.journal.event("checkpoint", step=saved.step, path=path, best=best, removed=removed)


def _num_positions(part: MicroBatch) -> int:
    """Positions that hold text: those of a segment, or where there are none, of a sample."""
    if part.segment_ids is not None:
        return int((part.segment_ids != 0).sum())
    return sum(row >= 0 for row in part.samples) * part.input_ids.shape[1]


def evaluate(layout: Layout, batches: list[MicroBatch]) -> float:
    """Mean loss over all labels of all ranks' batches; changes nothing. Every rank must call it."""
    losses, mesh = layout.evaluate(batches), layout.mesh
    # Summed on the host: fp32 loses count beyond 2^24 labels, and a device may have nothing wider.
    loss = losses.cpu().double().sum().item() if mesh.speaks_for_loss else 0.0
    labels = sum(part.num_labels for part in batches) if mesh.speaks_for_samples else 0
    found = mesh.world.gather((loss, labels))
    return float(sum(loss for loss, _ in found) / max(1, sum(labels for _, labels in found)))
