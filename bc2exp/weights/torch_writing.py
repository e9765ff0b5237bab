"""A file of torch.save whose tensors come afterwards, in pieces.

torch writes the file with room for the tensors (`skip_data`), which on the disk is a hole; then each piece
goes to its place. The zip around them has a checksum (CRC-32) of every member, which is filled in at the end,
so that the file is what torch.save would have made of the tensors.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bc2exp.weights.writing import Flusher, Header, OpenFile, bytes_of

_LOCAL_HEADER, _ENTRY = 30, 46
_CRC_IN_ENTRY, _LENGTHS_IN_ENTRY, _LENGTHS_IN_HEADER = 16, 28, 26
_DESCRIPTOR = b"PK\x07\x08"


class TorchWriter:
    """One .pt file being written. `close` it in any case.

    Args:
        folder, file: where.
        header: the tensors.
        flusher: brings the file to the disk.
        content: what the file is to hold, of the tensors by name.
    """

    def __init__(
        self,
        folder: Path,
        file: str,
        header: Header,
        flusher: Flusher,
        content: Callable[[Mapping[str, Tensor]], Any],
    ) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._header = file, header
        # memory that is asked for and never touched takes none
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in header.items()}
        saved = content(tensors)
        with torch.serialization.skip_data():
            torch.save(saved, path)
        self._places = _places(path)
        order = _in_order(saved)
        names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        self._members = {names[tensor.data_ptr()]: number for number, tensor in enumerate(order)}
        assert len(self._members) == len(header)
        for name, (dtype, shape) in header.items():
            assert self._places[self._members[name]].num_bytes == dtype.itemsize * math.prod(shape), name
        self._sums = dict.fromkeys(header, 0)
        self._rows = dict.fromkeys(header, 0)
        self._out = OpenFile(path, flusher)
        self._closed = False

    @property
    def files(self) -> dict[str, str]:
        """The file of every tensor."""
        return dict.fromkeys(self._header, self._file)

    def put(self, name: str, tensor: Tensor, row: int) -> None:
        """Write the next rows of a tensor."""
        assert row == self._rows[name], "a checksum takes rows in order"
        dtype, shape = self._header[name]
        data = bytes_of(tensor)
        self._sums[name] = zlib.crc32(data, self._sums[name])
        self._rows[name] += tensor.shape[0]
        place = self._places[self._members[name]]
        self._out.write(data, place.data + row * dtype.itemsize * math.prod(shape[1:]))

    def finish(self) -> None:
        """Fill in the checksums, when every tensor is there."""
        for name, number in self._members.items():
            place, checksum = self._places[number], struct.pack("<I", self._sums[name])
            self._out.write(_DESCRIPTOR + checksum, place.data + place.num_bytes)
            self._out.write(checksum, place.entry + _CRC_IN_ENTRY)

    def close(self) -> None:
        """Close the file."""
        if not self._closed:
            self._closed = True
            self._out.close()


class _Place:
    """Where a member of the zip has its data, and its entry in the list at the end."""

    def __init__(self, data: int, num_bytes: int, entry: int) -> None:
        self.data, self.num_bytes, self.entry = data, num_bytes, entry


def _places(path: Path) -> dict[int, _Place]:
    """The members `.../data/N` of a file of torch.save, by N."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entry = archive.start_dir
        for member in archive.infolist():
            file.seek(member.header_offset + _LENGTHS_IN_HEADER)
            data = member.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))
            folder, _, number = member.filename.rpartition("/data/")
            if folder and number.isdigit():
                file.seek(data + member.file_size)
                assert file.read(4) == _DESCRIPTOR, "torch writes a checksum behind each member"
                found[int(number)] = _Place(data, member.file_size, entry)
            file.seek(entry + _LENGTHS_IN_ENTRY)
            entry += _ENTRY + sum(struct.unpack("<HHH", file.read(6)))
    return found


def _in_order(node: Any) -> list[Tensor]:
    """The tensors in nested dictionaries, in the order in which torch numbers them."""
    if isinstance(node, Tensor):
        return [node]
    return (
        [tensor for value in node.values() for tensor in _in_order(value)] if isinstance(node, dict) else []
    )
