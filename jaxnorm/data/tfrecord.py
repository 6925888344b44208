"""Reads what TFDS prepared as TFRecord files, without TensorFlow.

A record is its length (u64), a checksum of the length (u32), its bytes and a checksum of these
(u32), all little-endian (https://www.tensorflow.org/tutorials/load_data/tfrecord). The second
checksum is compared; a wrong length makes it wrong, too.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _crc_table() -> np.ndarray:  # u32[256]
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _crc_table()


class Examples:
    """The examples of TFRecord files in their order, as `tfds.data_source` has them.

    Raises ValueError if a file is cut short and, when a record is read, if it is damaged.
    """

    def __init__(self, paths: Sequence[Path], decode: Callable[[bytes], Any]) -> None:
        self._records = [record for path in paths for record in _split(path.read_bytes())]
        self._decode = decode

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """Returns the decoded examples of these rows."""
        records, checksums = zip(*(self._records[row] for row in rows), strict=True)
        if (masked_crc32c(records) != np.array(checksums)).any():
            raise ValueError("a record has a wrong checksum")
        return [self._decode(bytes(record)) for record in records]


def _split(content: bytes) -> Iterator[tuple[memoryview, int]]:
    """Yields the bytes of each record of a file and their checksum."""
    view, start = memoryview(content), 0
    while start < len(content):
        stop = start + 16
        if stop <= len(content):
            stop += struct.unpack_from("<Q", content, start)[0]
        if not start + 20 <= stop <= len(content):  # an example has four bytes at least
            raise ValueError("a file is cut short, or is no TFRecord file")
        yield view[start + 12 : stop - 4], struct.unpack_from("<I", content, stop - 4)[0]
        start = stop


def masked_crc32c(records: Sequence[bytes | memoryview]) -> np.ndarray:  # u32[N]
    """Returns the CRC-32C of records of four bytes or more, masked as in TFRecord files.

    The records are right-aligned behind zeros, which leave a checksum of 0 as it is, so that one
    loop over columns serves all of them; its start of all ones goes into their first four bytes.
    """
    columns = np.zeros((len(records), max(map(len, records))), np.uint8)
    for row, record in zip(columns, records, strict=True):
        row[-len(record) :] = np.frombuffer(record, np.uint8)
        row[len(row) - len(record) :][:4] ^= 255
    crc = np.zeros(len(records), np.uint32)
    for column in np.ascontiguousarray(columns.T):
        crc = _TABLE[(crc ^ column) & 255] ^ crc >> 8
    crc = ~crc
    return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)
