"""The fine-tuning task on one rank, from its configuration to its files; and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from bc2exp.config.errors import UserError
from bc2exp.data.packing import WAYS
from bc2exp.data.splits import shuffled
from bc2exp.model.loss import norm_head_loss_sum
from bc2exp.tasks import get_task
from bc2exp.tasks.finetune import finetune
from bc2exp.tasks.supervised import read_splits
from bc2exp.weights import load_hf
from tests.shared_data import shared_data
from tests.small_run import SMALL, small_config
from tests.train.parts import ONE_RANK, Memory

MODEL = tuple(word for word in SMALL if word.startswith("model."))
QUICK = (
    "task=finetune",
    "dataset.sequence_length=64",
    "task.global_batch=16",
    "dataset.num_train=64",
    *MODEL,
)
STEPS = ("task.epochs=null", "task.steps=6", "task.eval_every=2", "task.optimizer.lr=1e-3")


def do(folder: Path, *words: str) -> Memory:
    """Do the task in `folder`; its journal."""
    journal = Memory()
    config = small_config(folder, *{word.partition("=")[0]: word for word in (*QUICK, *words)}.values())
    assert finetune(config, folder, ONE_RANK, journal) == "done"
    return journal


def notes(journal: Memory) -> list[str]:
    return [event["text"] for event in journal.events if event["event"] == "note"]


def event(journal: Memory, name: str) -> dict:
    (found,) = (event for event in journal.events if event["event"] == name)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Memory]:
    """A finished run of 6 steps."""
    folder = tmp_path_factory.mktemp("run")
    return folder, do(folder, *STEPS)


def test_the_task_is_found_by_its_name() -> None:
    assert get_task("finetune") is finetune


def test_a_run_leaves_its_rows_its_journal_and_weights(run: tuple[Path, Memory]) -> None:
    folder, journal = run
    assert list(journal.steps["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(journal.steps["eval/loss"]) == [2, 4, 6]
    for name, number in (("train", 64), ("eval", 296)):
        rows = [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == number
        assert {row["label"] for row in rows} == {"积极", "消极"}
        assert set(rows[0]) == {"review", "label"}
    report = json.loads((folder / "data" / "report.json").read_text())
    assert (report["rows"], report["split_seed"], report["labels"]) == (360, 42, {"0": 180, "1": 180})
    data = event(journal, "data")
    assert data["digest"] == report["digest"][:36]
    assert (data["train_samples"], data["held_out_samples"]) == (64, 296)
    assert (folder / "weights" / "tokenizer.model").is_file()
    steps = journal.steps
    assert all(
        positions > tokens > 0
        for positions, tokens in zip(
            steps["data/positions_per_step"].values(), steps["data/tokens_per_step"].values(), strict=True
        )
    )
    # four steps are an epoch of 64 rows
    assert sum(list(steps["data/tokens_per_step"].values())[:4]) == data["train_tokens"]


@pytest.mark.parametrize("micro_batch", ["null", "2"])
def test_every_way_of_packing_trains_the_same(tmp_path: Path, micro_batch: str) -> None:
    losses = {}
    for way in WAYS:
        words = (*STEPS, f"dataset.packing={way}", f"task.micro_batch={micro_batch}")
        journal = do(tmp_path / way, *words)
        losses[way] = journal.series("train/loss") + journal.series("eval/loss")
        computed = journal.series("data/positions_per_step")
        if way == "fixed":
            assert computed == [16 * 64] * 6
        else:
            assert max(computed) < 16 * 64
    for way in WAYS:
        assert losses[way] == pytest.approx(losses["fixed"], abs=1e-5)
    assert losses["fixed"][5] < losses["fixed"][0] - 1  # so that there was something to differ in


def test_rows_that_see_their_neighbours_would_be_noticed(tmp_path: Path) -> None:
    """The comparison above, with attention that does not stop at the end of a row."""
    apart = do(tmp_path / "apart", *STEPS).series("train/loss")
    from bc2exp.data import packing

    right = packing.Packer._assemble

    def wrong(self, planned):
        batch = right(self, planned)
        batch.segment_ids.clamp_(max=1)
        return batch

    with patch.object(packing.Packer, "_assemble", wrong):
        together = do(tmp_path / "together", *STEPS).series("train/loss")
    assert together != pytest.approx(apart, abs=1e-3)


def test_the_head_sees_labelled_positions_only(tmp_path: Path) -> None:
    rows = []

    def counted(hidden, weight, labels, **rest):
        rows.append((int((labels != -100).sum()), labels.numel()))
        return norm_head_loss_sum(hidden, weight, labels, **rest)

    products = []
    right = torch.mm

    def watched(left, second, *arguments, **named):
        products.append(left.shape[0])
        return right(left, second, *arguments, **named)

    with patch("bc2exp.model.baichuan2.norm_head_loss_sum", counted), patch("torch.mm", watched):
        do(tmp_path, *STEPS[:1], "task.steps=1", "task.eval_samples=1")
    labelled, positions = rows[0]
    assert 32 <= labelled < positions / 5
    assert products[0] == labelled


def test_a_broken_run_goes_on_as_if_it_had_not_been(tmp_path: Path, run: tuple[Path, Memory]) -> None:
    whole, journal = run
    cut = tmp_path / "cut"
    words = (*STEPS, "task.save_every=1", "task.keep_checkpoints=9")
    do(cut, *words)
    for path in sorted((cut / "checkpoints").iterdir())[3:]:
        shutil.rmtree(path)
    again = do(cut, *words)
    assert event(again, "start")["step"] == 3
    assert again.steps["train/loss"] == {step: journal.steps["train/loss"][step] for step in (4, 5, 6)}
    mine, theirs = (load_hf(folder / "weights").state_dict() for folder in (cut, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_best_evaluation_is_kept_and_its_weights_are_left(tmp_path: Path) -> None:
    words = ("task.epochs=null", "task.eval_every=1", "task.best_metric=eval/loss", "task.keep_checkpoints=1")
    with patch("bc2exp.train.trainer.evaluate", side_effect=[3.0, float("nan"), 1.0, 2.0]):
        journal = do(tmp_path, *words, "task.steps=4")
    names = ["step-00000003", "step-00000004"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names

    def assert_left(name: str) -> None:
        saved = load_file(tmp_path / "checkpoints" / name / "model.safetensors")
        left = load_hf(tmp_path / "weights").state_dict()
        assert all(torch.equal(left[name], saved[name]) for name in saved)

    assert_left("step-00000003")
    assert "the weights are those of step 3, evaluation loss 1.0000" in notes(journal)
    # a run that goes on knows what was best, and goes on from the newest
    with patch("bc2exp.train.trainer.evaluate", side_effect=[1.5]):
        further = do(tmp_path, *words, "task.steps=5")
    assert list(further.steps["train/loss"]) == [5]
    assert_left("step-00000003")
    with patch("bc2exp.train.trainer.evaluate", side_effect=[0.5]):
        do(tmp_path, *words, "task.steps=6")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    assert_left("step-00000006")


def test_a_damaged_best_checkpoint_is_named(tmp_path: Path) -> None:
    words = ("task.epochs=null", "task.eval_every=1", "task.best_metric=eval/loss", "task.steps=2")
    with patch("bc2exp.train.trainer.evaluate", side_effect=[1.0, 2.0]):
        do(tmp_path, *words)
    (tmp_path / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000001: is not whole: "):
        do(tmp_path, *words)


WAIMAI = ("dataset=waimai_10k", "dataset.num_train=10000")
GENUINE = "tokenizer/baichuan2_tokenizer.model"


def test_the_real_file(tmp_path: Path) -> None:
    path = shared_data("waimai_10k.csv")
    words = ("task=finetune", *WAIMAI, f"dataset.path={path}", *MODEL)
    splits = read_splits(small_config(tmp_path, *words).dataset)
    reading = splits.reading
    assert (reading.num_rows, reading.bad, reading.empty) == (11_987, {}, 0)
    assert Counter(sample.label for sample in reading.samples) == {"1": 4_000, "0": 7_987}
    assert (len(splits.train), len(splits.evaluation)) == (10_000, 1_987)
    assert len(reading.conflicts) == 7
    # of the seed alone: on any machine these rows in this order
    assert splits.digest() == "f9589b24deeaa200c50651be7cafd47c76ef147cbb33b0462dacc6d45c5b00fc"
    other = read_splits(small_config(tmp_path, *words, "dataset.split_seed=43", "seed=42").dataset)
    assert other.digest() != splits.digest()
    again = read_splits(small_config(tmp_path, *words, "seed=7").dataset)
    assert again.digest() == splits.digest()
    even = read_splits(small_config(tmp_path, *words, "dataset.stratified=true").dataset)
    assert Counter(sample.label for sample in even.evaluation) == {"1": 663, "0": 1_324}


def test_the_recipe_has_312_steps_of_the_real_rows(tmp_path: Path) -> None:
    from bc2exp.data.examples import encode_samples
    from bc2exp.data.packing import Packer, training_batches
    from bc2exp.tasks.build import total_steps
    from bc2exp.text.tokenizer import Tokenizer

    path, tokenizer = shared_data("waimai_10k.csv"), Tokenizer(shared_data(GENUINE))
    words = ("task=finetune", "model=baichuan2_7b", *WAIMAI, f"dataset.path={path}", "tracking.enabled=false")
    from bc2exp.config.load import finalize
    from bc2exp.config.preflight import preflight

    checked = preflight(words, sweep=False, folder=tmp_path)
    assert not checked.problems
    plain = finalize(checked.jobs[0], tmp_path)
    config = small_config(tmp_path, "task=finetune", *WAIMAI, f"dataset.path={path}", *MODEL)
    splits = read_splits(config.dataset)
    length, batch = plain["dataset"]["sequence_length"], plain["task"]["global_batch"]
    found = encode_samples(
        splits.train, tokenizer, chat_format="modelzoo", sequence_length=length, over_long="drop"
    )
    assert (found.dropped, found.marks, len(found.examples)) == (0, 0, 10_000)
    config.task.steps, config.task.epochs, config.task.global_batch = None, 1.0, batch
    assert total_steps(config.task, len(found.examples)) == 312
    # 8 ranks of micro batch 1, as the recipe: positions computed beside those of rows padded to 1024
    packer = Packer(found.examples, "packed", length, 1, 8)
    computed = sum(
        part.input_ids.numel()
        for rank in range(8)
        for batches in [training_batches(packer, global_batch=batch, rank=rank, seed=42)]
        for step in range(20)
        for part in batches(step)
    )
    assert 20 * batch * length / computed > 20


def table(path: Path, *rows: tuple, header: tuple = ("label", "review")) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return f"dataset.path={path}"


ROWS = [(n % 2, f"第{n}单，{'快' if n % 2 else '慢'}") for n in range(40)]
OWN = ("dataset=waimai_10k", "dataset.num_train=32", *STEPS)


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        do(folder, *OWN, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_input_is_named(tmp_path: Path) -> None:
    named = table(tmp_path / "a.csv", *ROWS, header=("label", "text"))
    assert "dataset.prompt=review: " not in (text := refused(tmp_path / "1", named))
    assert text.startswith("dataset.text_column=review: ")
    outside = table(tmp_path / "b.csv", *ROWS, *[(2, f"{n}") for n in range(11)])
    assert "11 of 51 rows are bad (11 label '2' has no word" in refused(tmp_path / "2", outside)
    (tmp_path / "c.csv").write_text('label,review\n1,"好\n0,慢\n', encoding="utf-8")
    assert "never ends" in refused(tmp_path / "3", f"dataset.path={tmp_path / 'c.csv'}")
    assert "holds no row" in refused(tmp_path / "4", table(tmp_path / "d.csv"))
    ones = table(tmp_path / "e.csv", *[(1, text) for _, text in ROWS])
    assert "has the label '1'" in refused(tmp_path / "5", ones)
    assert "do not come out of the 40" in refused(
        tmp_path / "6", table(tmp_path / "f.csv", *ROWS), "dataset.num_train=40"
    )
    long = table(tmp_path / "g.csv", *[(label, "很" * 300) for label, _ in ROWS])
    text = refused(tmp_path / "7", long)
    assert text.startswith("dataset.sequence_length=64: none of 32 rows to train on fits; the longest has ")
    for name in "1234567":
        assert not (tmp_path / name / "weights").exists()


def test_what_is_odd_in_the_rows_is_told_and_counted(tmp_path: Path) -> None:
    odd = [(1, "好<reserved_106></s>"), (0, "很" * 300), (3, "?"), (1, ""), (1, ROWS[0][1])]
    journal = do(tmp_path / "run", *OWN, table(tmp_path / "a.csv", *ROWS, *odd), "dataset.num_train=38")
    told = " | ".join(notes(journal))
    assert "bad rows were left out: 1 (1 label '3' has no word in dataset.label_words)" in told
    assert "1 rows say nothing and were left out" in told
    assert f"1 texts have several labels and were kept: {ROWS[0][1]}" in told
    assert "are longer than dataset.sequence_length=64 tokens and were left out; the longest has" in told
    assert "2 times a text says what begins a turn or ends a text" in told
    (listed,) = (tmp_path / "run" / "data" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(listed)["row"] == 43
    data = event(journal, "data")
    assert (data["bad_rows"], data["empty_rows"], data["with_several_labels"]) == (1, 1, 1)
    assert data["train_dropped"] + data["held_out_dropped"] == 1


def test_best_of_nothing_is_refused(tmp_path: Path) -> None:
    short = [(n % 2, "快" if n < 38 else "很" * 300) for n in range(40)]
    seed = next(
        seed for seed in range(200) if shuffled(40, seed)[-1] >= 38
    )  # the one held-out row is too long
    words = (f"dataset.split_seed={seed}", "task.best_metric=eval/loss", "dataset.num_train=39")
    text = refused(tmp_path / "run", table(tmp_path / "a.csv", *short), *words)
    assert text == "task.best_metric=eval/loss: waimai_10k has no row to evaluate on"


@pytest.mark.parametrize("kind", ["instruction", "conversation"])
def test_the_other_kinds_train_too(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "rows.jsonl"
    if kind == "instruction":
        rows = [{"instruction": f"数到{n}", "input": "", "output": f"{n}"} for n in range(40)]
    else:
        talk = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}] * 2
        rows = [{"conversations": talk[: 2 + 2 * (n % 2)]} for n in range(40)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    journal = do(tmp_path / "run", f"dataset={kind}", f"dataset.path={file}", "dataset.num_train=32", *STEPS)
    losses = journal.series("train/loss")
    assert losses[-1] < losses[0] - 0.5
    first = json.loads((tmp_path / "run" / "data" / "train.jsonl").read_text().splitlines()[0])
    assert first["turns"][0]["role"] == "user"
