"""conf/ and experiments/ are found from a wheel and from an editable install, in any working folder."""

import os
import subprocess
import sys
import sysconfig
from importlib import util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_heads=4",
    "model.num_layers=1",
    "dataset.sequence_length=32",
    "task.steps=2",
)


def run(*command: object, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The interpreter of an empty environment that borrows this one's dependencies (but not this package)."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    (Path(site.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_an_installation_trains_in_another_folder(environment: Path, tmp_path: Path, kind: str) -> None:
    if kind == "wheel":
        run(environment, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, REPOSITORY, cwd=tmp_path)
        (wheel,) = tmp_path.glob("bc2exp-*.whl")
        run(environment, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    else:
        run(environment, "-m", "pip", "install", "-q", "--no-deps", "-e", REPOSITORY, cwd=tmp_path)
    elsewhere = tmp_path / "别处 elsewhere"
    elsewhere.mkdir()
    found = run(environment, "-c", "import bc2exp; print(bc2exp.__file__)", cwd=elsewhere)
    assert Path(found.strip()).is_relative_to(REPOSITORY) is (kind == "editable")
    for command in ([environment, "-m", "bc2exp"], [environment.with_name("bc2exp")]):
        seen = run(*command, *SMALL, "task.resume=never", cwd=elsewhere)
        assert "weights" in seen
    assert len(list(elsewhere.glob("runs/*/*/weights/config.json"))) == 2
    assert (elsewhere / "mlflow.db").is_file()
    if util.find_spec("torch_npu") is not None:
        words = ("hardware=1npu", "hardware.rehearsal=true", "hardware.precision=fp32")
        assert "rehearsal" in run(environment, "-m", "bc2exp", *SMALL, *words, cwd=elsewhere)
    assert "baichuan2_13b" in run(environment, "-m", "bc2exp", "--help", cwd=elsewhere)
