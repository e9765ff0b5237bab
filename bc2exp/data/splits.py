"""Which samples are trained on and which are held out: a function of the seed and the number of samples.

The order is that of the digests of (seed, index), so no library's generator decides it: the same everywhere
and with every version.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bc2exp.config.errors import UserError


class Split(NamedTuple):
    """Indices of samples, in the order of the shuffle; those that are in neither part are not used."""

    train: list[int]
    evaluation: list[int]


def shuffled(num_samples: int, seed: int) -> list[int]:
    """0 to num_samples - 1 in the order of the seed."""
    return sorted(range(num_samples), key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())


def split_samples(
    labels: Sequence[str | None],
    *,
    seed: int,
    num_train: int | None,
    num_eval: int | None,
    weights: Sequence[int],
    stratified: bool,
) -> Split:
    """Split as many samples as there are `labels`.

    Args:
        labels: of each sample; looked at with `stratified` only.
        seed: of the shuffle.
        num_train, num_eval: samples of the parts; one that is None takes what is left.
        weights: of training, evaluation and a part that is not used, where neither number is given.
        stratified: each part has as much of each label as the whole, to the sample.

    Raises:
        UserError: there are fewer samples, or none is left for one of the parts.
    """
    total = len(labels)
    if num_train is None and num_eval is None:
        shares = [part / sum(weights) for part in weights]
        num_train = math.floor(shares[0] * total + 0.5)
        num_eval = math.floor((shares[0] + shares[1]) * total + 0.5) - num_train
    elif num_train is None:
        assert num_eval is not None
        num_train = total - num_eval
    elif num_eval is None:
        num_eval = total - num_train
    if num_train < 1 or num_eval < 1 or num_train + num_eval > total:
        raise UserError(
            f"dataset.num_train, dataset.num_eval: {max(num_train, 0)} rows to train on and "
            f"{max(num_eval, 0)} to evaluate on do not come out of the {total} that there are; name fewer"
        )
    order = shuffled(total, seed)
    if not stratified:
        return Split(order[:num_train], order[num_train : num_train + num_eval])
    train = _stratum(order, labels, num_train)
    taken = set(train)
    rest = [index for index in order if index not in taken]
    return Split(train, _stratum(rest, labels, num_eval))


def _stratum(order: list[int], labels: Sequence[str | None], number: int) -> list[int]:
    """The first `number` of `order`, as many of each label as there are among all of it, rounded so that they
    add up: the largest remainders get one more."""
    counts = Counter(labels[index] for index in order)
    exact = {label: number * count / len(order) for label, count in counts.items()}
    wanted = {label: math.floor(share) for label, share in exact.items()}
    remainders = sorted(exact, key=lambda label: (wanted[label] - exact[label], str(label)))
    for label in remainders[: number - sum(wanted.values())]:
        wanted[label] += 1
    chosen = []
    for index in order:
        if wanted[labels[index]]:
            wanted[labels[index]] -= 1
            chosen.append(index)
    return chosen
