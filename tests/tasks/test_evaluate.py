"""The evaluation task: one model, however it is named and laid out, has one set of figures."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bc2exp.config.errors import UserError
from bc2exp.embedded import TOKENIZER
from bc2exp.parallel.world import World
from bc2exp.tasks import evaluate as evaluation_task
from bc2exp.tasks import get_task
from bc2exp.tasks.evaluate import evaluate
from bc2exp.text.chat import modelzoo_prompt
from bc2exp.text.tokenizer import Tokenizer
from bc2exp.train import TrainingError
from bc2exp.weights import load_hf
from tests.small_run import small_config
from tests.train.parts import ONE_RANK, Memory

QUICK = ("task=evaluate", "task.resamples=200", "dataset.sequence_length=64")
TRAINED = (
    "task=finetune",
    "parallelism=single",
    "task.epochs=null",
    "task.steps=24",
    "task.save_every=12",
    "task.eval_every=null",
    "task.global_batch=8",
    "task.optimizer.lr=0.01",
    "dataset.sequence_length=64",
)


def do(folder: Path, *words: str, world: World = ONE_RANK) -> tuple[dict[str, Any], Memory]:
    """Evaluate in `folder`; the report and the journal."""
    journal = Memory()
    set_again = [word.partition("=")[0] for word in words]
    quick = [word for word in QUICK if word.partition("=")[0] not in set_again]
    assert evaluate(small_config(folder, *quick, *words), folder, world, journal) == "done"
    report = folder / "evaluation.json"
    return (json.loads(report.read_text()) if report.is_file() else {}), journal


def on_a_rank(world: World, folder: Path, words: tuple[str, ...]) -> None:
    """The same on one of several ranks."""
    own = folder if world.rank == 0 else folder / f"rank-{world.rank}"
    do(own, *words, world=world)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Memory]:
    """A fine-tuning on the embedded reviews: its folder and its journal."""
    folder, journal = tmp_path_factory.mktemp("tuned") / "tuned", Memory()
    config = small_config(folder, *TRAINED)
    assert get_task("finetune")(config, folder, ONE_RANK, journal) == "done"
    return folder, journal


@pytest.fixture(scope="module")
def judged(tuned, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Memory, Path]:
    """The untrained model and the tuned one: report, journal, folder."""
    folder = tmp_path_factory.mktemp("judged")
    words = f"task.models={{base: null, tuned: {tuned[0]}}}"
    return (*do(folder, words), folder)


def test_a_tuned_model_is_better_than_an_untrained_one(judged) -> None:
    report, journal, _ = judged
    assert (report["rows"], report["words"], report["labels"]) == (60, ["积极", "消极"], ["1", "0"])
    base, tuned = report["models"]["base"], report["models"]["tuned"]
    assert base["answers"]["free_form"] > 0.9
    assert tuned["answers"]["free_form"] < 0.1
    assert tuned["answers"]["accuracy"]["value"] > base["answers"]["accuracy"]["value"]
    assert journal.steps["eval/tuned/accuracy"][0] == tuned["likelihood"]["accuracy"]["value"]
    assert journal.steps["eval/tuned/answers/free_form"][0] == tuned["answers"]["free_form"]
    assert journal.steps["eval/tuned against base/answers/mcnemar_p"][0] == report["comparisons"][1]["p"]


def test_the_loss_is_the_one_that_training_measured(tuned, judged) -> None:
    measured = tuned[1].steps["eval/loss"][24]
    assert judged[0]["losses"]["tuned"]["loss"] == pytest.approx(measured, rel=1e-5)


def test_all_rows_are_in_the_tables(judged) -> None:
    _, _, folder = judged
    rows = list(csv.reader((folder / "predictions.csv").open(encoding="utf-8", newline="")))
    as_json = json.loads((folder / "predictions.json").read_text())
    assert rows[0] == as_json["columns"]
    assert rows[0][:4] == ["review", "label", "base", "tuned"]
    assert len(rows) == 61
    assert [row[:4] for row in rows[1:]] == [line[:4] for line in as_json["data"]]


def test_every_row_has_its_own_scores(tuned, judged) -> None:
    """Each row of the table against the model alone, whatever order and packs the rows went through in."""
    model, tokenizer = load_hf(tuned[0] / "weights"), Tokenizer(TOKENIZER)
    words = [tokenizer.encode(word) for word in judged[0]["words"]]
    for line in json.loads((judged[2] / "predictions.json").read_text())["data"][::7]:
        prompt = modelzoo_prompt(tokenizer, f"{line[0]} -> ")
        for word, column in zip(words, (8, 9), strict=True):
            with torch.no_grad():
                rows = model(torch.tensor([prompt + word]))[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(word) - 1)
            found = sum(float(rows[at, token]) for at, token in zip(places, word, strict=True))
            assert line[column] == pytest.approx(found, abs=1e-4)
        with torch.no_grad():
            said = int(model(torch.tensor([prompt]))[0, -1].argmax())
        assert line[3].startswith(tokenizer.decode([said]))


def prompts_scored(world: World, folder: Path, words: tuple[str, ...]) -> int:
    """How many prompts a rank scores."""
    counts = []
    score = evaluation_task.word_log_likelihoods

    def counted(logits, prompts, *rest, **settings):
        counts.append(len(prompts))
        return score(logits, prompts, *rest, **settings)

    evaluation_task.word_log_likelihoods = counted
    try:
        on_a_rank(world, folder, words)
    finally:
        evaluation_task.word_log_likelihoods = score
    return sum(counts)


def test_copies_share_the_work(two_ranks, tmp_path: Path) -> None:
    words = ("hardware=2cpu", "task.generate=false")
    assert two_ranks(prompts_scored, tmp_path / "ddp", (*words, "parallelism=ddp")) == [30, 30]
    assert two_ranks(prompts_scored, tmp_path / "tp", (*words, "parallelism=tp2")) == [60, 60]


def test_a_run_its_weights_and_its_checkpoint_have_identical_figures(tuned, judged, tmp_path: Path) -> None:
    """Saved, loaded from the published layout or from the checkpoint: the same to the last digit."""
    run = tuned[0]
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(run / "weights", tmp_path / "elsewhere" / "published")
    named = {
        "run": run,
        "weights": run / "weights",
        "copied": tmp_path / "elsewhere" / "published",
        "checkpoint": run / "checkpoints" / "step-00000024",
        "earlier": run / "checkpoints" / "step-00000012",
    }
    models = ", ".join(f"{name}: {path}" for name, path in named.items())
    report, _ = do(tmp_path / "run", f"task.models={{{models}}}")
    figures, losses = report["models"], report["losses"]
    for name in ("run", "weights", "copied", "checkpoint"):
        assert figures[name] == judged[0]["models"]["tuned"], name
        assert losses[name] == judged[0]["losses"]["tuned"], name
    assert losses["earlier"] != losses["run"]


def test_figures_do_not_depend_on_the_layout(two_ranks, tuned, judged, tmp_path: Path) -> None:
    """Two copies, two tensor-parallel ranks, and a layout of stages, whose ranks become copies."""
    expected = judged[0]
    for layout in ("ddp", "tp2", "pp2"):
        words = ("hardware=2cpu", f"parallelism={layout}", f"task.models={{base: null, tuned: {tuned[0]}}}")
        two_ranks(on_a_rank, tmp_path / layout, (*words,))
        report = json.loads((tmp_path / layout / "evaluation.json").read_text())
        assert report["models"] == expected["models"], layout
        for name in ("base", "tuned"):
            assert report["losses"][name]["loss"] == pytest.approx(expected["losses"][name]["loss"], rel=1e-5)


def test_plain_text_has_a_perplexity(tmp_path: Path) -> None:
    report, journal = do(tmp_path, "dataset=embedded", "task.samples=8")
    (losses,) = report["losses"].values()
    assert losses["perplexity"] == pytest.approx(2.718281828 ** losses["loss"], rel=1e-6)
    assert 7 < losses["loss"] < 10  # an untrained model of 2,048 words
    assert journal.steps["eval/tiny_7b/perplexity"][0] == losses["perplexity"]
    assert "models" not in report


def test_conversations_have_a_loss(tmp_path: Path) -> None:
    lines = [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n}!"}]}
        for n in range(40)
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    report, _ = do(tmp_path / "run", "dataset=conversation", f"dataset.path={file}", "dataset.split=[1,1,0]")
    assert report["losses"]["tiny_7b"]["loss"] > 5


def told(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        do(folder, *words)
    return str(error.value)


def test_a_prompt_that_leaves_no_room_is_named(tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    rows = [("review", "label"), *((f"送餐{n}", str(n % 2)) for n in range(20))]
    rows[3] = ("好" * 500, "1")
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows(rows)
    words = ("dataset=waimai_10k", f"dataset.path={file}", "dataset.num_train=1", "model.max_positions=64")
    message = told(tmp_path / "run", *words)
    assert "1 of 19 rows" in message
    assert "long.csv row 3" in message
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_folders_of_another_shape_are_named(tuned, tmp_path: Path) -> None:
    folder = tmp_path / "bent"
    shutil.copytree(tuned[0] / "weights", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    message = told(tmp_path / "run", f"task.models={folder}")
    assert f"task.models={folder}" in message
    assert "(2048, 32) instead of (2048, 48)" in message
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "has 100 rows" in told(tmp_path / "run", f"task.models={folder}")
    checkpoint = tmp_path / "other" / "checkpoints" / "step-00000024"
    shutil.copytree(tuned[0] / "checkpoints" / "step-00000024", checkpoint)
    resolved = (tuned[0] / "resolved.yaml").read_text().replace("num_layers: 2", "num_layers: 3")
    (tmp_path / "other" / "resolved.yaml").write_text(resolved)
    assert "is of another model" in told(tmp_path / "run", f"task.models={checkpoint}")
    (damaged,) = checkpoint.glob("model.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "other" / "resolved.yaml").write_text((tuned[0] / "resolved.yaml").read_text())
    assert "checksum" in told(tmp_path / "run", f"task.models={checkpoint}")


def test_a_folder_without_a_tokenizer_takes_the_one_that_is_named(tuned, judged, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tuned[0] / "weights", folder)
    (folder / "tokenizer.model").unlink()
    report, _ = do(tmp_path / "run", f"task.models={{tuned: {folder}}}", f"model.tokenizer={TOKENIZER}")
    assert report["models"]["tuned"] == judged[0]["models"]["tuned"]


def test_a_stop_leaves_no_report(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    journal = Memory()
    assert evaluate(small_config(tmp_path, *QUICK), tmp_path, ONE_RANK, journal) == "stopped"
    assert not (tmp_path / "evaluation.json").exists()


def test_what_is_left_out_of_the_loss_is_said(tmp_path: Path) -> None:
    _, journal = do(tmp_path, "dataset.sequence_length=20")
    texts = [event["text"] for event in journal.events if event["event"] == "note"]
    assert any("rows are longer than dataset.sequence_length=20 tokens" in text for text in texts)
    (data,) = [event for event in journal.events if event["event"] == "data"]
    assert (data["evaluated"], data["split"]) == (60, "evaluation")


def test_how_far_it_is_is_told(judged) -> None:
    told = [event for event in judged[1].events if event["event"] == "progress"]
    ends = {event["label"] for event in told if event["done"] == event["total"] == 60}
    assert ends == {f"{name}: {what}" for name in ("base", "tuned") for what in ("likelihoods", "answers")}


def test_a_full_memory_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmore lines")

    monkeypatch.setattr(evaluation_task, "word_log_likelihoods", full)
    with pytest.raises(
        TrainingError, match=r"rank 0 is out of memory \(tried to allocate 3 GiB\); a smaller"
    ):
        do(tmp_path)


def train_in_stages(world: World, folder: Path) -> dict[int, float]:
    """A pretraining in two stages; the evaluation losses."""
    config = small_config(
        folder if world.rank == 0 else folder / "rank-1",
        "hardware=2cpu",
        "parallelism=pp2",
        "task.steps=2",
        "dataset.sequence_length=32",
        "task.eval_samples=16",
    )
    journal = Memory()
    assert get_task("pretrain")(config, folder, world, journal) == "done"
    return journal.steps["eval/loss"]


def test_a_checkpoint_of_a_pipeline_is_judged_on_one_device(two_ranks, tmp_path: Path) -> None:
    run = tmp_path / "staged"
    losses, _ = two_ranks(train_in_stages, run)
    report, _ = do(
        tmp_path / "judged",
        "dataset=embedded",
        "dataset.sequence_length=32",
        "task.samples=16",
        f"task.models={run / 'checkpoints' / 'step-00000002'}",
    )
    (found,) = report["losses"].values()
    assert found["loss"] == pytest.approx(losses[2], rel=1e-5)
