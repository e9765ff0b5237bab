"""The small data set that ships with the package, so that a first run needs no licensed data.

- `corpus_zh.txt`, `corpus_en.txt`: everyday Chinese and English prose, one document a line.
- `reviews.csv`: Chinese food-delivery reviews, columns `label` (1 good, 0 bad) and `review`.
- `tokenizer.model`: a SentencePiece model of these texts with the properties of the genuine Baichuan2
  tokenizer; `python -m bc2exp.embedded.train_tokenizer` makes it.

All text in this folder was written for this project and is under its licence, Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
CORPUS = (ROOT / "corpus_zh.txt", ROOT / "corpus_en.txt")
REVIEWS = ROOT / "reviews.csv"
TOKENIZER = ROOT / "tokenizer.model"
