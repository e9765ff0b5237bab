"""Compile the libraries of a rehearsal, once for each version of their source, of torch and of torch_npu.

They are kept in `bc2exp/rehearsal` of the user's cache folder (XDG_CACHE_HOME, else ~/.cache). torch is not
imported: the parent of a run builds before it starts the ranks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

from bc2exp.config.errors import UserError
from bc2exp.hardware import npu_environment
from bc2exp.hardware.rehearsal import symbols

SOURCES = (
    "runtime.c",
    "pages.c",
    "streams.c",
    "communicator.c",
    "collectives.c",
    "transfers.c",
    "opapi.c",
    "census.c",
)
CORE = "libbc2exp_rehearsal.so"
# The CANN libraries that torch_npu links to or opens by name; each becomes an empty one that depends on CORE.
CANN_LIBRARIES = (
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libgraph.so",
    "libge_runner.so",
    "libacl_tdt_channel.so",
    "libhccl.so",
    "libopapi.so",
    "libatb.so",
    "libfmk_parser.so",
    "libascend_protobuf.so",
)
HERE = Path(__file__).parent
NATIVE = HERE / "native"


def libraries() -> list[Path]:
    """The compiled libraries in the order in which they are loaded; compiles them if they never were.

    Raises UserError where torch_npu or a C compiler is missing, where torch and torch_npu do not pair, and
    where the cache folder cannot be written to.
    """
    check()
    target = _folder()
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
        except OSError as error:
            raise UserError(
                f"hardware.rehearsal=true: its libraries are kept in {target.parent}, which cannot be "
                f"written to ({error.strerror}); name another place with XDG_CACHE_HOME"
            ) from None
        try:
            _build_into(scratch)
            try:
                scratch.rename(target)  # atomic: several processes may build at once, and one of them wins
            except OSError:
                if not target.exists():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return [target / CORE, *(target / name for name in CANN_LIBRARIES)]


def check() -> None:
    """Raise UserError unless torch_npu is installed and pairs with torch, and there are tools to compile."""
    for problem in npu_environment.problems(os.environ, rehearsal=True):
        raise UserError(f"hardware.rehearsal=true: {problem}")
    tools = {"CC": "cc", "NM": "nm"}
    missing = [tool for key in tools if shutil.which(tool := os.environ.get(key, tools[key])) is None]
    if missing and not _folder().exists():
        raise UserError(
            f"hardware.rehearsal=true: compiles its libraries once, and {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not there; install a C compiler with binutils, or name "
            "yours with CC and NM"
        )


def _folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    content = hashlib.sha256()
    for file in sorted([*NATIVE.glob("*.[ch]"), HERE / "build.py", HERE / "symbols.py"]):
        content.update(file.name.encode() + file.read_bytes())
    versions = "-".join(f"{name}-{metadata.version(name)}" for name in ("torch", "torch_npu"))
    return root / "bc2exp" / "rehearsal" / f"{versions}-{content.hexdigest()[:16]}"


def _build_into(folder: Path) -> None:
    torch_npu = _package("torch_npu")
    missing = symbols.missing_symbols(torch_npu, _package("torch"))
    core = folder / CORE
    options = ["-O2", "-w", f"-I{NATIVE}", f"-Wl,-soname,{CORE}", "-o", str(core)]
    sources = [str(NATIVE / name) for name in SOURCES]
    _compile(*options, *sources, "-lpthread")
    implemented = {name for _, name in symbols.symbols(core, "--defined-only")}
    generated = folder / "refusals.c"
    with_status = symbols.functions_returning_status(torch_npu)
    generated.write_text(symbols.refusals(missing, implemented, with_status))
    _compile(*options, *sources, str(generated), "-lpthread")
    for name in CANN_LIBRARIES:
        _compile(f"-Wl,-soname,{name}", "-Wl,--no-as-needed", "-o", str(folder / name), str(core))


def _compile(*arguments: str) -> None:
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"hardware.rehearsal=true: the C compiler failed: {' '.join(command)}\n{result.stderr}"
        )


def _package(name: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
