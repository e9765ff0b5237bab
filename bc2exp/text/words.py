"""Ids of texts, word by word, with those of words that came before kept.

SentencePiece looks at a text as a whole. But no merge of BPE, and no path of a unigram model, crosses a place
between two characters that no piece has side by side. Where a model has no piece with a space behind another
character, the ids of a text are therefore those of its words, and most words of a text have come before.
Characters that share a piece with no other are words of their own; in Baichuan2 tabs, line ends, stops and
question marks.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from itertools import islice

import sentencepiece

SPACE = "\u2581"
"""How a piece shows a space."""
LONGEST_KEPT = 32
"""Bytes; text without spaces, as Chinese is, comes in long words that do not come again."""
MOST_KEPT = 2**19
"""Words."""

_MARK = SPACE.encode()
_LOOK = " a  b "
_ASCII = "".join(map(chr, [9, 10, *range(33, 127)]))


class Words(dict[bytes, bytes]):
    """{word, with the spaces before it, UTF-8: its ids, int32}, made where they are missing."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, pattern: bytes) -> None:
        super().__init__()
        self._processor = processor
        self._split = re.compile(pattern).findall

    def __missing__(self, word: bytes) -> bytes:
        ids = array("i", self._processor.encode(word)).tobytes()
        if len(word) <= LONGEST_KEPT:
            if len(self) >= MOST_KEPT:
                for old in list(islice(self, MOST_KEPT // 2)):
                    del self[old]
            self[word] = ids
        return ids

    def encode(self, text: bytes) -> array[int]:
        """The ids of a text."""
        if _MARK in text:  # which then stands beside spaces like one more
            return array("i", self._processor.encode(text))
        return array("i", b"".join(map(self.__getitem__, self._split(text))))


def find_words(processor: sentencepiece.SentencePieceProcessor) -> Words | None:
    """The words of a model; None where the ids of a text need not be those of its words."""
    if processor.normalize(_LOOK) != _LOOK.replace(" ", SPACE):
        return None  # spaces do not stay as they are
    if processor.piece_to_id(SPACE) == processor.unk_id():
        return None  # unknown characters side by side are one
    listed = "\0".join(_pieces_of_text(processor))
    if " " in listed or re.search(f"[^\0{SPACE}]{SPACE}", listed):
        return None
    alone = [re.escape(character) for character in _ASCII if _is_alone(character, processor, listed)]
    runs = "".join(f"|{character}+" for character in alone)
    return Words(processor, f" *[^ {''.join(alone)}]+| +{runs}".encode())


def _pieces_of_text(processor: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """Those that stand for what a text says, and not for a byte or a mark."""
    for index, piece in enumerate(processor.id_to_piece(list(range(processor.get_piece_size())))):
        if not (piece.startswith("<") and (processor.is_byte(index) or processor.is_control(index))):
            yield piece


def _is_alone(character: str, processor: sentencepiece.SentencePieceProcessor, listed: str) -> bool:
    """Whether it is a piece, and in no other piece but runs of itself."""
    own = re.escape(character)
    if processor.piece_to_id(character) == processor.unk_id():
        return False
    return re.search(f"[^\0{own}]{own}|{own}[^\0{own}]", listed) is None
