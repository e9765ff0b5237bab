"""One rank that cannot go on: what is said, once, and the exit code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.launch.commands import STEPS, events, records

NAN = """
from bc2exp.train.trainer import Trainer
take = Trainer._step
def step(self, number, *rest):
    if number == 6:
        self.layout.model.norm.weight.data.fill_(float("nan"))
    return take(self, number, *rest)
Trainer._step = step
"""

FULL_DISK = """
import errno
from bc2exp.tracking.journal import Journal
append = Journal._append
def full(self, head, body):
    if head.get("step") == 6:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    append(self, head, body)
Journal._append = full
"""

NO_IMPORT = """
sys.modules["bc2exp.config.errors"] = None
"""


@pytest.fixture(scope="module")
def story(launches):
    """Four commands that fail, side by side: {name: (command, its run folder)}."""
    reviews = launches("wrong")
    (reviews.folder / "外卖 1.csv").write_text("label,review\n1,好吃\n", encoding="utf-8")
    started = {
        "wrong": (reviews, reviews.start("dataset=text", "dataset.path=外卖 1.csv", "dataset.column=text")),
        "nan": (launch := launches("nan"), launch.start(*STEPS, inject=NAN)),
        "full": (launch := launches("full"), launch.start(*STEPS, inject=FULL_DISK)),
        "mute": (launch := launches("mute"), launch.start(*STEPS, inject=NO_IMPORT)),
    }
    for _, command in started.values():
        command.wait()
        command.nothing_left()
    return SimpleNamespace(
        **{name: (command, launch.only_run()) for name, (launch, command) in started.items()}
    )


def test_what_only_a_rank_can_notice_of_a_configuration_is_one_sentence(story):
    command, run = story.wrong
    assert command.process.returncode == 2
    sentence = "bc2exp: dataset.column=text: 外卖 1.csv has no such column; it has label, review\n"
    assert command.err.replace(f"{command.launch}/", "") == sentence
    (failed,) = events(run, "failed")
    assert failed["kind"] == "user"
    assert failed["reason"].startswith("dataset.column=text: ")


def test_a_loss_that_is_no_number_is_one_sentence_with_the_samples(story):
    command, run = story.nan
    assert command.process.returncode == 1
    first, *rest = command.err.splitlines()
    assert first.startswith(
        "bc2exp: step 6: the loss is nan; the weights were left as after step 5; training"
    )
    assert rest == []
    assert [(event["kind"], event["segment"]) for event in events(run, "failed")] == [("training", 0)]
    assert "goes on from" in command.out  # the checkpoint of step 4


def test_a_full_disk_is_one_sentence(story):
    command, run = story.full
    assert command.process.returncode == 1
    reason = "[Errno 28] No space left on device"
    assert (
        command.err
        == f"bc2exp: the disk of {run} is full ({reason}); make room, and the same command goes on\n"
    )
    assert [event["kind"] for event in events(run, "failed")] == ["disk"]


def test_a_rank_that_dies_before_it_can_say_why_leaves_the_end_of_its_log(story):
    command, run = story.mute
    assert command.process.returncode == 1
    first, *rest = command.err.splitlines()
    assert (
        first
        == "bc2exp: the ranks ended with code 1 before they could say why; the last lines of their logs:"
    )
    assert "import of bc2exp.config.errors halted; None in sys.modules" in rest[-2]
    assert rest[-1] == f"bc2exp: the run failed; its logs are in {run.relative_to(command.launch)}/logs"
    assert [record["event"] for record in records(run)] == ["failed"]


def test_a_folder_that_cannot_be_written_to_is_one_sentence(launch):
    (launch.folder / "runs").write_text("in the way")
    command = launch.run(*STEPS, code=2)
    assert command.err.count("\n") == 1
    assert command.err.startswith(f"bc2exp: the run folder {launch.folder}/runs/pretrain-tiny_7b/")
    assert "cannot be written" in command.err
    assert [path.name for path in launch.folder.iterdir()] == ["runs"]
