"""Multipart bodies, read with the package python-multipart."""

from importlib import import_module
from typing import Any, Final

from tiltflow.serving.wire import WireError

MAX_PARTS: Final = 4096  # a part costs far more to read than its bytes


def read_parts(body: bytes, content_type: str) -> dict[str, bytes]:
    """Return the parts of a multipart body by name.

    Args:
        body: All of it.
        content_type: The header, which tells the boundary.

    Raises:
        WireError: `unsupported_media` if python-multipart is not installed; `invalid_request` if the body is malformed,
            a part has no name or that of another one, or there are too many.
    """
    try:
        library = import_module("python_multipart.multipart")
    except ImportError as error:
        raise WireError(
            "unsupported_media",
            "multipart bodies need the package python-multipart on the server: pip install 'tiltflow[serve]'; "
            "safetensors and JSON work without it",
            param="Content-Type",
        ) from error
    boundary = library.parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise WireError("invalid_request", "the Content-Type has no boundary", param="Content-Type")
    collector = _Collector(library)
    try:
        parser = library.MultipartParser(boundary, collector.callbacks())
        parser.write(body)
        parser.finalize()
    except ValueError as error:  # the base of that library's errors
        raise WireError("invalid_request", f"the multipart body is malformed: {error}", param="body") from error
    if not collector.ended:
        raise WireError("invalid_request", "the multipart body has no end", param="body")
    return collector.parts


class _Collector:
    """Puts the pieces together that the parser finds."""

    def __init__(self, library: Any):
        self.parts: dict[str, bytes] = {}
        self.ended = False
        self._library = library
        self._field = self._value = b""
        self._disposition = b""
        self._pieces: list[bytes] = []

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_field,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end,
            "on_end": self._end_all,
        }

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise WireError("invalid_request", f"the multipart body has more than {MAX_PARTS} parts", param="body")
        self._disposition = b""
        self._pieces = []

    def _add_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end(self) -> None:
        name = self._library.parse_options_header(self._disposition)[1].get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise WireError("invalid_request", f"part {len(self.parts)} of the body has no name", param="body")
        if name in self.parts:
            raise WireError("invalid_request", f"two parts of the body are called {name!r}", param=name)
        self.parts[name] = b"".join(self._pieces)

    def _end_all(self) -> None:
        self.ended = True
