"""The guides are twins; their commands run, in the order of the page, on small files of the names they use;
the messages they quote are the ones that a person gets."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bc2exp.config.errors import UserError
from bc2exp.config.preflight import preflight
from bc2exp.data import rows
from bc2exp.embedded import TOKENIZER
from tests.data.stores import write_by_hand
from tests.guide_runs import do
from tests.one_thread import one_thread
from tests.pages import broken_links, commands, fenced, shape, table
from tests.small_run import small_words

__all__ = ["one_thread"]

ENGLISH, CHINESE = GUIDES = ("docs/guides/data.md", "docs/guides/data.zh.md")
REASONS, RECIPES, MESSAGES = 2, 3, 4  # the places of the tables among those of the guide
QUICK = ("task.steps=1", "task.save_every=null", "task.eval_every=null")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the guide names."""
    folder = tmp_path_factory.mktemp("site")
    texts = [f"第{n}单：送餐{'很' * (n % 7)}快。Order {n} came warm and on time." for n in range(200)]
    (folder / "notes.txt").write_text("\n".join(texts), encoding="utf-8")
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "review"), *((n % 2, text) for n, text in enumerate(texts))])
    objects = [json.dumps({"id": n, "content": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    (folder / "corpus" / "2024").mkdir(parents=True)
    (folder / "corpus" / "a.jsonl").write_text("\n".join(objects[:100]), encoding="utf-8")
    (folder / "corpus" / "2024" / "b.jsonl").write_text("\n".join(objects[100:]), encoding="utf-8")
    objects[4], objects[10] = '{"id": 4, "content": ', '{"id": 10}'
    for n in (3, *range(20, 30)):
        objects[n] = json.dumps({"id": n, "content": None})
    (folder / "dirty.jsonl").write_text("\n".join(objects), encoding="utf-8")
    columns = pa.table({"id": range(200), "text": texts})
    pyarrow.parquet.write_table(columns, folder / "articles.parquet")
    alpaca = next(word for line in commands(ENGLISH) for word in line.split() if "alpaca/" in word)
    (folder / "alpaca").mkdir()
    pyarrow.parquet.write_table(columns, folder / alpaca.partition("=")[2])
    (folder / "Baichuan2-7B-Base").mkdir()
    shutil.copy(TOKENIZER, folder / "Baichuan2-7B-Base" / "tokenizer.model")
    (folder / "theirs").mkdir()
    write_by_hand(folder / "theirs" / "corpus", [[(n * 7 + k) % 2048 for k in range(40)] for n in range(99)])
    (folder / "dataset").mkdir()
    (yaml,) = fenced(ENGLISH, "yaml")
    (folder / "dataset" / "news.yaml").write_text(yaml.partition("\n")[2], encoding="utf-8")
    return folder


def words_of(command: str) -> list[str]:
    """The overrides of a command line, as the shell would hand them over."""
    program, overrides = shlex.split(command)[:3], shlex.split(command)[3:]
    assert program == ["python", "-m", "bc2exp"]
    return overrides


def prepared(site: Path, words: list[str]) -> Path:
    """Do the task of the command line, with the small training's words, in `site`; the run folder."""
    return do(site, small_words(*words))[0]


def report_of(folder: Path) -> dict:
    """The report in a run folder or beside a store."""
    return json.loads((folder / "report.json").read_text())


def told(site: Path, *words: str) -> str:
    """The one sentence with which a preparation, unless the words name another task, is refused."""
    with pytest.raises(UserError) as error:
        prepared(site, [*words] if "task=pretrain" in words else ["task=prepare", *words])
    return str(error.value)


def follow(site: Path, command: str) -> None:
    """Do what a command line says; trainings in few small steps, and those of several ranks only composed."""
    if not command.startswith("python -m bc2exp "):
        subprocess.run(["bash", "-euc", command], cwd=site, check=True, capture_output=True, timeout=20)
        return
    words = words_of(command)
    assert preflight(words, sweep=False, folder=site).problems == []
    if any(word.startswith(("hardware=", "model=")) for word in words):
        return
    if "task=pretrain" in words:
        words = [*(word for word in words if not word.startswith("task.steps=")), *QUICK]
    prepared(site, words)


def test_the_twins_have_one_shape_and_one_set_of_commands() -> None:
    for kind in ("bash", "yaml"):
        assert fenced(ENGLISH, kind) == fenced(CHINESE, kind)
    assert shape(ENGLISH) == shape(CHINESE)
    # what stands in backticks in the tables is the program's, in either language
    for name in (ENGLISH, CHINESE):
        assert [row[-1] for row in table(name, RECIPES)] == [row[-1] for row in table(ENGLISH, RECIPES)]
        assert [row[0] for row in table(name, MESSAGES)] == [row[0] for row in table(ENGLISH, MESSAGES)]
        assert [row[0] for row in table(name, REASONS)] == [row[0] for row in table(ENGLISH, REASONS)]


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_the_commands_do_what_they_say_one_after_the_other(site: Path) -> None:
    for command in commands(ENGLISH):
        follow(site, command)
    # the store of the first command serves the second
    first, second = sorted(site.glob("done/*"))[:2]
    assert report_of(first)["documents"] == 200
    assert (second / "weights").is_dir()
    folders = {path.parent.name.partition("-")[0] for path in site.glob("runs/prepared/*/tokens.bin")}
    assert folders == {"text", "news", "alpaca"}
    stores = [path.parent for path in site.glob("runs/prepared/*/report.json")]
    sources = [report_of(store)["sources"][0]["path"] for store in stores]
    assert sources.count(str(site / "reviews.csv")) == 1


@pytest.mark.parametrize("words", [row[1].strip("`") for row in table(ENGLISH, RECIPES)])
def test_the_words_of_a_recipe_fit_both_commands(site: Path, words: str) -> None:
    given = ["dataset=text", *shlex.split(words)]
    assert preflight(["task=pretrain", *given], sweep=False, folder=site).problems == []
    num_documents = 99 if "theirs" in words else 100 if "corpus/2024" in words else 200
    assert report_of(prepared(site, ["task=prepare", *given]))["documents"] == num_documents


def test_the_reasons_are_those_of_the_program() -> None:
    names = {value for key, value in vars(rows).items() if key.isupper() and isinstance(value, str)}
    assert {row[0].strip("`") for row in table(ENGLISH, REASONS)} == names


def test_the_error_in_the_guide_is_the_one_of_its_file(site: Path) -> None:
    def like_the_guide(text: str) -> str:
        return re.sub(r"text-[0-9a-f]{12}", "text-X", text.replace(str(site), "/home/you").strip())

    message = told(
        site,
        "dataset=text",
        "dataset.path=dirty.jsonl",
        "dataset.column=content",
        "dataset.cache=runs/again",
    )
    example, listed = (block.strip() for block in fenced(ENGLISH) if "/home/you" in block)
    assert like_the_guide(f"bc2exp: {message}").replace("/again/", "/prepared/") == like_the_guide(example)
    (quarantine,) = (site / "runs" / "again").glob("*.quarantine.jsonl")
    assert listed in quarantine.read_text().replace(str(site), "/home/you").splitlines()


def test_the_messages_are_those_that_a_person_gets(site: Path) -> None:
    text, trained = "dataset=text", ("task=pretrain", "task.steps=1", "dataset.sequence_length=128")
    (site / "notes.md").write_text("# notes")
    (site / "semicolons.csv").write_text("label;review\n1;good\n")
    (site / "utf16.txt").write_text("送餐很快\n", encoding="utf-16")
    (site / "open.csv").write_text('label,review\n1,"good\n0,bad\n')
    (site / "blank.txt").write_text("\n\n")
    (site / "short.txt").write_text("你好\n", encoding="utf-8")
    for name in ("lonely", "cut", "damaged", "alien"):
        (site / name).mkdir()
    (site / "lonely" / "corpus.bin").write_bytes(b"\0" * 8)
    write_by_hand(site / "alien" / "corpus", [[1, 2500]])
    shutil.copytree(site / "theirs", site / "cut", dirs_exist_ok=True)
    (site / "cut" / "corpus.bin").write_bytes(b"\0" * 8)
    whole = (text, "dataset.path=notes.txt", "dataset.name=whole", "dataset.cache=damaged")
    store = Path(report_of(prepared(site, ["task=prepare", *whole]))["store"])
    shutil.copytree(store.parent, site / "moved")
    report = report_of(site / "moved") | {"tokenizer_sha256": "0" * 64}
    (site / "moved" / "report.json").write_text(json.dumps(report))
    store.with_name("tokens.bin").write_bytes(b"\0" * 8)
    cases = [
        (text, "dataset.path=review.csv", "dataset.column=review"),
        (text, "dataset.path=corpus/*.json", "dataset.column=content"),
        (text, "dataset.path=notes.md"),
        ("dataset.path=notes.txt",),
        (text, "dataset.path=reviews.csv"),
        (text, "dataset.path=reviews.csv", "dataset.column=text"),
        (text, "dataset.path=semicolons.csv", "dataset.column=review"),
        (text, "dataset.path=articles.parquet", "dataset.column=id"),
        (text, "dataset.path=utf16.txt"),
        (text, "dataset.path=open.csv", "dataset.column=review"),
        (text, "dataset.path=blank.txt"),
        (text, "dataset.path=corpus", "dataset.column=contents"),
        (text, "dataset.path=dirty.jsonl", "dataset.column=content"),
        (text, "dataset.path=short.txt", *trained),
        (text, "dataset.path=notes.txt", "model.vocab_size=1000"),
        (text, "dataset.path=moved/tokens.bin"),
        (text, "dataset.path=lonely/corpus.bin"),
        (text, "dataset.path=cut/corpus.bin"),
        (text, "dataset.path=alien/corpus.bin"),
        (text, "dataset.path=theirs/corpus.bin", "dataset.append_eos=true"),
        whole,
        (text, "dataset.path=notes.txt", "dataset.cache=notes.md/stores"),
    ]
    quoted = [row[0].strip("`") for row in table(ENGLISH, MESSAGES)]
    assert len(quoted) == len(cases)
    for words, message in zip(cases, quoted, strict=True):
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert re.fullmatch(pattern, given := told(site, *words)), f"{message}\n{given}"
