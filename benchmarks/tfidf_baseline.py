"""TF-IDF with logistic regression on the split that task=finetune uses: what a simple model makes of it.

    python benchmarks/tfidf_baseline.py --data waimai_10k.csv [--grams 1 2] [--l2 1.0] [--threads 1]
                                        [overrides of dataset=waimai_10k]

Features are the n-grams of characters that the training rows have twice or more, weighted tf x idf (smoothed,
rows of length 1). The regression is binary, with an L2 penalty on all but the intercept, fitted by
L-BFGS in fp64. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bc2exp.config.load import finalize, read
from bc2exp.config.preflight import preflight
from bc2exp.data.supervised import Sample
from bc2exp.tasks.supervised import Splits, read_splits


def splits_of(data: Path, overrides: list[str]) -> Splits:
    """The rows, split as the task splits them."""
    words = ["task=finetune", "dataset=waimai_10k", f"dataset.path={data.resolve()}", *overrides]
    checked = preflight(words, sweep=False, folder=Path.cwd())
    if checked.problems:
        sys.exit("\n".join(checked.problems))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resolved.yaml"
        path.write_text(OmegaConf.to_yaml(finalize(checked.jobs[0], Path.cwd())))
        return read_splits(read(path).dataset)


def grams(text: str, lengths: list[int]) -> Counter[str]:
    """The n-grams of characters of a text."""
    return Counter(text[at : at + n] for n in lengths for at in range(len(text) - n + 1))


def features(
    samples: list[Sample], lengths: list[int], column: dict[str, int], idf: torch.Tensor
) -> torch.Tensor:
    """tf x idf, rows of length 1, sparse [samples, features]."""
    rows, columns, values = [], [], []
    for row, sample in enumerate(samples):
        counts = {g: n for g, n in grams(sample.text, lengths).items() if g in column}
        weights = [n * idf[column[g]].item() for g, n in counts.items()]
        norm = math.sqrt(sum(weight * weight for weight in weights)) or 1.0
        rows += [row] * len(counts)
        columns += [column[g] for g in counts]
        values += [weight / norm for weight in weights]
    size = (len(samples), len(column))
    return torch.sparse_coo_tensor(
        torch.tensor([rows, columns]), torch.tensor(values, dtype=torch.float64), size, check_invariants=True
    ).coalesce()


def fit(x: torch.Tensor, y: torch.Tensor, l2: float) -> torch.Tensor:
    """Weights and at last the intercept of a logistic regression: least sum of losses + l2 / 2 |w|^2."""
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = torch.sparse.mm(x, weights[:-1, None])[:, 0] + weights[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, y, reduction="sum")
        loss = loss + l2 / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def main() -> None:
    """Fit on the rows to train on, count right ones among those held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--grams", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--l2", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args, overrides = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    splits = splits_of(args.data, overrides)
    seen = Counter(g for sample in splits.train for g in grams(sample.text, args.grams))
    column = {g: index for index, g in enumerate(sorted(g for g, count in seen.items() if count > 1))}
    idf = torch.tensor([math.log((1 + len(splits.train)) / (1 + seen[g])) + 1 for g in column])
    positive = max(sample.label for sample in splits.train if sample.label is not None)
    labels = torch.tensor([float(sample.label == positive) for sample in splits.train], dtype=torch.float64)
    weights = fit(features(splits.train, args.grams, column, idf), labels, args.l2)
    held_out = features(splits.evaluation, args.grams, column, idf)
    scores = torch.sparse.mm(held_out, weights[:-1, None])[:, 0] + weights[-1]
    right = [
        bool(score > 0) == (s.label == positive) for score, s in zip(scores, splits.evaluation, strict=True)
    ]
    majority = Counter(sample.label for sample in splits.evaluation).most_common(1)[0][1]
    print(
        json.dumps(
            {
                "features": len(column),
                "train": len(splits.train),
                "evaluation": len(right),
                "accuracy": sum(right) / len(right),
                "majority": majority / len(right),
            }
        )
    )


if __name__ == "__main__":
    main()
