"""What every rank of the tests imports, imported once."""

import torch
import torch.distributed.tensor.debug

import bc2exp.tasks.pretrain  # noqa: F401

torch.set_num_threads(1)
