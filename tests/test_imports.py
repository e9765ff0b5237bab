"""Who may import whom, and the words that only the hardware package may say. Read from the source."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "bc2exp"
FILES = sorted(PACKAGE.rglob("*.py"))

LEAVES = ("config", "storage", "text", "hardware", "tracking", "embedded")
LAYERS = (
    LEAVES,
    ("model", "data", "report"),
    ("weights", "parallel"),
    ("train", "generation"),
    ("plan",),
    ("evaluation",),
    ("tasks",),
    ("worker",),
)
"""Each part of the package may import the parts of the layers before its own."""
PARENT = {
    "launch": {"config", "storage", "tracking", "report", "hardware"},
    "__main__": {"config", "storage", "tracking", "report", "hardware", "launch"},
}
"""The parent's side stands apart: these only."""
BESIDE: dict[str, set[str]] = {
    "config": set(),
    "storage": set(),
    "embedded": {"storage"},
    "text": {"config", "embedded"},
    "hardware": {"config"},
    "tracking": {"config", "storage"},
}
"""What a leaf may use beside itself."""
DEVICE_WORDS = re.compile(r"(?<![A-Za-z])(npu|cuda|hccl|nccl|gloo)(?![A-Za-z])", re.IGNORECASE)
HEAVY = ("torch", "mlflow", "transformers", "pyarrow", "sentencepiece", "matplotlib")


def part_of(file: Path) -> str:
    """The part of the package that a file belongs to: its folder, or its own name at the top."""
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.lineno, node.module
            # `from bc2exp import text` imports a part as well
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def allowed(part: str) -> set[str]:
    """The parts that a part may import."""
    if part in PARENT:
        return PARENT[part]
    if part in BESIDE:
        return BESIDE[part]
    layer = next(number for number, parts in enumerate(LAYERS) if part in parts)
    return {name for parts in LAYERS[:layer] for name in parts}


def test_every_part_has_a_place() -> None:
    placed = {name for parts in LAYERS for name in parts} | set(PARENT) | {"__init__"}
    assert {part_of(file) for file in FILES} <= placed
    assert len(FILES) > 40
    assert set(BESIDE) == set(LEAVES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    part = part_of(file)
    for line, name in imports(file):
        parts = name.split(".")
        if parts[0] != "bc2exp" or len(parts) < 2 or parts[1].startswith("__version"):
            continue
        assert part != "__init__", f"{file}:{line}: the package itself imports nothing"
        assert parts[1] == part or parts[1] in allowed(part), f"{file}:{line}: {part} imports {parts[1]}"


def test_only_the_tracker_names_mlflow_in_an_import() -> None:
    found = {file for file in FILES for _, name in imports(file) if name.split(".")[0] == "mlflow"}
    names = ("logged_models.py", "mlflow.py", "mlflow_find.py", "mlflow_runs.py")
    assert found == {PACKAGE / "tracking" / name for name in names}


def words_of(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the code of a file: names and strings, without comments and docstrings."""
    source = file.read_text(encoding="utf-8")
    documented = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.start[0] not in documented:
            yield token.start[0], token.string


def test_device_words_stay_in_the_hardware_package() -> None:
    home = (PACKAGE / "hardware", PACKAGE / "config" / "hardware.py")
    said = [
        f"{file.relative_to(REPOSITORY)}:{line}: {text}"
        for file in FILES
        if not any(file.is_relative_to(place) for place in home)
        for line, text in words_of(file)
        if DEVICE_WORDS.search(text)
    ]
    assert said == []


def test_the_walk_sees_a_device_word(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        '"""cuda"""\n# npu\ndef f():\n    """nccl"""\n    return torch.cuda, "hccl:gloo", cudapath\n'
    )
    assert [text for _, text in words_of(file) if DEVICE_WORDS.search(text)] == ["cuda", '"hccl:gloo"']


@pytest.mark.parametrize(
    "module",
    ["bc2exp.__main__", "bc2exp.launch.run", "bc2exp.config.preflight", "bc2exp.hardware.probe"],
)
def test_the_parent_side_is_light_to_import(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
