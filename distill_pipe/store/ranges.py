"""An object as a file that can be read in any order: Parquet readers take the footer and the row group they want, and
nothing else is downloaded. The trade-off: every read is a request, and nothing is kept of it."""

import io
from collections.abc import Callable
from typing import Any


class Ranges(io.RawIOBase):
    """An object as a file; `part(first, stop)` gives bytes of it."""

    def __init__(self, size: int, part: Callable[[int, int], bytes]) -> None:
        self._size, self._part, self._at = size, part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = max(min(self._at + len(buffer), self._size), self._at)
        buffer[:stop - self._at] = self._part(self._at, stop) if stop > self._at else b""
        count, self._at = stop - self._at, stop
        return count
