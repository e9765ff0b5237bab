"""Every layout against one process: `python -m tests.parallel.parity [name ...]` prints the differences.

fp32: 5 AdamW steps with accumulation and clipping; a difference above 1e-5 is marked, and is the exit code.
"""

from __future__ import annotations

import sys
import time

from tests.parallel.pool import Pool
from tests.parallel.problem import CASES, SHAPES, difference, train

LIMIT = 1e-5


def main(names: list[str]) -> int:
    """Print the table; 1 where a layout is not within the limit."""
    if unknown := sorted(set(names) - set(CASES)):
        print(f"no such layout: {', '.join(unknown)}; there are: {', '.join(CASES)}", file=sys.stderr)
        return 2
    pool, failed = Pool(), False
    print(f"{'layout':22} {'kind':4} {'recompute':9} {'loss':>8} {'norm':>8} {'eval':>8} {'gradient':>8}  s")
    for kind in SHAPES:
        reference = pool.ask(1, train, kind, CASES["single"])[0]
        for name in sorted(names or CASES, key=lambda name: CASES[name].size):
            for recompute in ("none", "selective", "full"):
                start = time.perf_counter()
                found = pool.ask(CASES[name].size, train, kind, CASES[name], recompute)[0]
                apart, seconds = difference(found, reference), time.perf_counter() - start
                failed |= apart.worst() > LIMIT
                print(
                    f"{name:22} {kind:4} {recompute:9} {apart.loss:8.1e} {apart.norm:8.1e} "
                    f"{apart.evaluation:8.1e} {apart.gradient:8.1e}  {seconds:.1f}"
                    + (f"  ABOVE {LIMIT:g}: {apart.weight}" if apart.worst() > LIMIT else ""),
                    flush=True,
                )
    pool.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
