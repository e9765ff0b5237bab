"""Training: the loop, the optimizer, checkpoints, throughput. Loads no torch by itself."""


class TrainingError(RuntimeError):
    """Training cannot go on; the sentence says at which step and why."""
