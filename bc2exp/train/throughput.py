"""How fast a run is: samples, tokens, and the part of a named peak that is used."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


def flops_per_token(
    *,
    num_parameters: int,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    sequence_length: float,
    labelled: float = 1.0,
) -> float:
    """Floating-point operations of training on one token, forward and backward.

    6 for each parameter that multiplies (the embedding only looks up), and attention's scores and values at
    causal cost: 6 · layers · hidden · sequence. Recomputation does not count. For the 7B at 4096 that is
    45.2 G, as the recipe's table has it. Only the `labelled` part of the tokens reaches the head.
    """
    multiplying = num_parameters - vocab_size * hidden_size * (2 - labelled)
    return 6.0 * multiplying + 6.0 * num_layers * hidden_size * sequence_length


@dataclass
class Throughput:
    """Time between records, over the steps in between.

    Args:
        global_batch: samples a step.
        sequence_length: tokens a sample; None: samples differ, and tokens are those that were counted.
        num_devices: devices that share the work.
        flops_per_token: as above.
        peak_tflops: dense peak of one device; None: no MFU.
        rehearsal: the devices are played by the host: its time is no device's, and nothing is a throughput.
    """

    global_batch: int
    sequence_length: int | None
    num_devices: int
    flops_per_token: float
    peak_tflops: float | None
    rehearsal: bool = False
    _start: float = field(default_factory=time.perf_counter)
    _steps: int = 0
    _tokens: int = 0
    _positions: int = 0

    def restart(self) -> None:
        """Begin to count now; what happened before (an evaluation, a checkpoint) is not a step's time."""
        self._start, self._steps, self._tokens, self._positions = time.perf_counter(), 0, 0, 0

    def count_step(self, tokens: int = 0, positions: int = 0) -> None:
        """One more step has ended, in which `tokens` of all samples were computed, and with padding
        `positions`."""
        self._steps += 1
        self._tokens += tokens
        self._positions += positions

    def measure(self) -> dict[str, float]:
        """Means over the steps since the last call or restart, and begin anew."""
        step_time = (time.perf_counter() - self._start) / self._steps
        tokens_per_step = self._tokens / self._steps
        values: dict[str, float] = {}
        if self.sequence_length is None:
            values["data/tokens_per_step"] = tokens_per_step
            values["data/positions_per_step"] = self._positions / self._steps
        self.restart()
        if self.rehearsal:
            return {**values, "rehearsal/step_time_s": step_time}
        samples = self.global_batch / step_time
        if self.sequence_length is None:
            tokens = tokens_per_step / step_time / self.num_devices
        else:
            tokens = samples * self.sequence_length / self.num_devices
        values |= {
            "perf/step_time_s": step_time,
            "perf/samples_per_s": samples,
            "perf/tokens_per_s_per_device": tokens,
        }
        if self.peak_tflops is not None:
            values["perf/mfu"] = tokens * self.flops_per_token / (self.peak_tflops * 1e12)
        return values
