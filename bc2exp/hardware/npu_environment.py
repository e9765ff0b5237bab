"""What an Ascend NPU asks of the environment, told without torch: variables, and packages that pair.

One place says what is set, why, and what is refused. What the person has set comes first everywhere.
Sources: Ascend/pytorch docs/zh/api/environment_variable, CANN's environment variable reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path

ALLOCATOR = "PYTORCH_NPU_ALLOC_CONF"
OTHER_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of the same setting. torch_npu ends the process where the first is set beside its own, and lets the
others pass unread: both are refused, by name."""

VARIABLES = {
    # Rank 0 may read weights for minutes before it connects; the default of 120 s ends such a start.
    "HCCL_CONNECT_TIMEOUT": "1200",
    # The others wait in a collective while one rank writes a checkpoint. Below the 1800 s of torch's process
    # groups, which would else speak first and know less.
    "HCCL_EXEC_TIMEOUT": "1500",
    # Samples of several lengths leave holes in segments of fixed size.
    ALLOCATOR: "expandable_segments:True",
    "TASK_QUEUE_ENABLE": "2",  # operators are prepared and launched in two threads of their own
    "CPU_AFFINITY_CONF": "2",  # each rank's threads stay on cores near its device
    "INF_NAN_MODE_ENABLE": "1",  # an overflow stays visible instead of becoming the largest number
    # An operator without a kernel fails by name, where it would else run on the CPU in silence.
    "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",
}

DETERMINISTIC = {"HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1"}
"""Sums of collectives in one order; the operators are told by `Backend.setup`."""

_MARGIN_SECONDS = 60
_LIBRARY = "libascendcl.so"
_INSTALLATIONS = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_SETUP = "source the set_env.sh of its installation (/usr/local/Ascend/ascend-toolkit/set_env.sh)"


def variables(
    environment: Mapping[str, str], *, interface: str | None = None, deterministic: bool = False
) -> dict[str, str]:
    """What a rank on an NPU is started with, where `environment` does not say otherwise.

    `interface`: the network interface that leads to the other machines.
    """
    wanted = VARIABLES | (DETERMINISTIC if deterministic else {})
    if interface is not None:
        wanted = {**wanted, "HCCL_SOCKET_IFNAME": f"={interface}"}  # "=": this very name, no prefix
    if any(name in environment for name in OTHER_ALLOCATORS):
        wanted = {name: value for name, value in wanted.items() if name != ALLOCATOR}
    found = {name: environment.get(name, value) for name, value in wanted.items()}
    waits = found["HCCL_EXEC_TIMEOUT"]
    # The wait for an event has to exceed the one above; 0 is for ever.
    longer = str(int(waits) + _MARGIN_SECONDS) if waits.isdecimal() and int(waits) else "0"
    return found | {"HCCL_EVENT_TIMEOUT": environment.get("HCCL_EVENT_TIMEOUT", longer)}


def problems(environment: Mapping[str, str], *, rehearsal: bool = False) -> Iterator[str]:
    """Why a run on NPUs cannot begin here, a sentence each. In a rehearsal nothing is asked of CANN."""
    yield from _allocators(environment)
    pairing = unpaired(_version("torch"), _version("torch_npu"), _other_device())
    if pairing:
        yield pairing
    if not rehearsal and not _has_cann(environment):
        yield f"CANN is not in this environment ({_LIBRARY} is not found); {_SETUP}"


def _allocators(environment: Mapping[str, str]) -> Iterator[str]:
    found = [name for name in (ALLOCATOR, *OTHER_ALLOCATORS) if name in environment]
    if len(found) > 1:
        yield (
            f"{' and '.join(found)} are set together, which torch_npu does not take; unset all but "
            f"{ALLOCATOR if ALLOCATOR in found else found[0]}"
        )


def unpaired(torch: str | None, torch_npu: str | None, other_device: str | None = None) -> str | None:
    """Why these two versions do not work together, with the pair that would; None where they do.

    torch_npu is made for one minor version of torch. `other_device` is what torch was built for instead.
    """
    if torch is None:
        return "torch is not installed; install torch and torch_npu of the same version"
    wanted = _minor(torch)
    fitting = f"pip install 'torch=={wanted}.*' 'torch_npu=={wanted}.*'"
    if torch_npu is None:
        return f"torch_npu is not installed, and torch is {torch}; the pair that works: {fitting}"
    if _minor(torch_npu) != wanted:
        return f"torch {torch} and torch_npu {torch_npu} do not pair; the pair that works: {fitting}"
    if other_device is not None:
        return (
            f"torch {torch} is built for {other_device}, and one torch drives one kind of device; install "
            f"its CPU build ({torch.split('+')[0]}+cpu)"
        )
    return None


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _other_device() -> str | None:
    """What else than the CPU the installed torch is built for, such as `cuda 12.8`; read, not imported."""
    found = util.find_spec("torch")
    if found is None or not found.origin:
        return None
    file = Path(found.origin).with_name("version.py")
    text = file.read_text() if file.is_file() else ""
    match = re.search(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return f"{match[1]} {match[2]}" if match else None


def _has_cann(environment: Mapping[str, str]) -> bool:
    folders = [environment[name] + "/lib64" for name in _INSTALLATIONS if environment.get(name)]
    folders += [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return any((Path(folder) / _LIBRARY).exists() for folder in folders)
