"""What torch_npu's libraries expect of CANN, and a refusal in C for all of it that `native` lacks."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path

# Functions that return a status are known from the headers in the wheel; these families have none there.
STATUS_PREFIXES = ("Hccl", "Msprof", "rt")


def symbols(library: Path, which: str) -> list[tuple[str, str]]:
    """(kind, name) of a library's dynamic symbols, as `nm -D` lists them; `which` is an option of nm."""
    command = [os.environ.get("NM", "nm"), "-D", which, str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in listing.splitlines()]


def missing_symbols(torch_npu: Path, torch: Path) -> list[str]:
    """Names that a library of torch_npu needs and neither torch, torch_npu, Python nor the C library has.

    The C and C++ libraries version their symbols (name@GLIBC_2.17) and CANN does not, which tells them apart.
    """
    own = sorted(torch_npu.rglob("*.so"))
    defined: set[str] = set()
    for library in own + sorted((torch / "lib").glob("*.so*")):
        defined.update(name.split("@")[0] for _, name in symbols(library, "--defined-only"))
    needed: set[str] = set()
    for library in own:
        found = symbols(library, "--undefined-only")
        needed.update(name for kind, name in found if kind == "U" and "@" not in name)
    return sorted(name for name in needed - defined if not name.startswith(("Py", "_Py", "__")))


def functions_returning_status(torch_npu: Path) -> set[str]:
    """Functions that the ACL headers of the wheel declare as `aclError name(...)`."""
    names: set[str] = set()
    for header in (torch_npu / "include" / "acl").glob("*.h"):
        names.update(re.findall(r"\baclError\s+(\w+)\s*\(", header.read_text(errors="replace")))
    return names


def refusals(missing: Iterable[str], implemented: Collection[str], with_status: Collection[str]) -> str:
    """C source with one function for every missing symbol.

    One that returns a status records the refusal and returns "feature not supported". Another ACL function
    (it returns a pointer or a size) records it and returns null. Anything else, C++ included, cannot report
    an error: it prints its name and aborts.
    """
    lines = ['#include "rehearsal.h"', ""]
    for number, name in enumerate(name for name in missing if name not in implemented):
        if name in with_status or name.startswith(STATUS_PREFIXES):
            returns, body = "int", f'return rehearsal_refuse("{name}");'
        elif name.startswith("acl"):
            returns, body = "void *", f'rehearsal_refuse("{name}"); return 0;'
        else:
            returns, body = "void", f'rehearsal_refuse_and_abort("{name}");'
        lines.append(f'{returns} refused_{number}(void) __asm__("{name}");')
        lines.append(f"{returns} refused_{number}(void) {{ {body} }}")
    return "\n".join(lines) + "\n"
