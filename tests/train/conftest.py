"""On one thread; and a training that has done a step, with its checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bc2exp.parallel.layout import parallelize
from bc2exp.parallel.mesh import Mesh
from bc2exp.train.checkpoint import Progress
from tests.one_thread import one_thread
from tests.train.parts import ONE_RANK, adamw, make_checkpoints, make_model, make_trainer, save

__all__ = ["one_thread"]


@pytest.fixture
def trained():
    """trained(folder): model, layout and optimizer after a step, and checkpoints in `folder` that keep one
    and hold that of the step."""

    def trained(folder):
        model = make_model()
        optimizer = adamw(model)
        make_trainer(folder, model, optimizer=optimizer, steps=1).run(0)
        checkpoints, told = make_checkpoints(folder, keep=1)
        layout = parallelize(model, Mesh(ONE_RANK), precision="fp32")
        save(checkpoints, layout, optimizer, Progress(1, 8))

        def save_next(step=2):
            return save(checkpoints, layout, optimizer, Progress(step, 8 * step))

        return SimpleNamespace(
            model=model,
            optimizer=optimizer,
            layout=layout,
            checkpoints=checkpoints,
            told=told,
            save_next=save_next,
        )

    return trained
