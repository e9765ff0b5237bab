"""SentencePiece, read directly.

The published Baichuan2 tokenizer class breaks on every transformers since 4.34; the model file itself does
not. Raw text follows bare SentencePiece: `<s>` in a document is ordinary text, nothing is added.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import AnyStr

import sentencepiece

from bc2exp.config.errors import UserError
from bc2exp.embedded import TOKENIZER
from bc2exp.text.words import Words, find_words

_BATCH_DOCUMENTS = 1024


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        path: the model file.
        vocab_size: number of pieces.
        unk_id, bos_id, eos_id: the ids of what is no piece of any text, of a beginning and of an end.
        digest: sha256 of the file, hexadecimal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = path.read_bytes()
            if not content:
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.tokenizer={path}: is not a SentencePiece model ({_first_line(error)}); "
                "Baichuan2's own is the file tokenizer.model of its published model folder"
            ) from None
        self.digest = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing is added."""
        return list(self._processor.encode(text))

    @cached_property
    def _words(self) -> Words | None:
        return find_words(self._processor)

    def piece(self, index: int) -> str:
        """The piece of an id: `</s>` for 2."""
        return str(self._processor.id_to_piece(index))

    def find_piece(self, piece: str) -> int | None:
        """The id of a piece; None where the model has no such piece."""
        index: int = self._processor.piece_to_id(piece)
        return index if self.piece(index) == piece else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids: `decode(encode(text)) == text`."""
        return str(self._processor.decode(list(ids)))

    def encode_documents(self, documents: Iterable[AnyStr]) -> Iterator[array[int]]:
        """The ids (int32) of each document (str, or bytes of UTF-8), in order, in bounded memory."""
        if self._words is not None:
            for document in documents:
                yield self._words.encode(document.encode() if isinstance(document, str) else document)
            return
        stream = iter(documents)
        while batch := list(islice(stream, _BATCH_DOCUMENTS)):
            for ids in self._processor.encode(batch, num_threads=1):
                yield array("i", ids)


def find_tokenizer(tokenizer: str | None, weights: str | None) -> Path:
    """The tokenizer file a configuration means.

    Args:
        tokenizer: `model.tokenizer`: a file, or a folder that holds `tokenizer.model`.
        weights: `model.weights`: its folder's own tokenizer serves where none is named.
    """
    if tokenizer is not None:
        path = Path(tokenizer)
        return path / "tokenizer.model" if path.is_dir() else path
    if weights is not None and (Path(weights) / "tokenizer.model").is_file():
        return Path(weights) / "tokenizer.model"
    return TOKENIZER


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
