"""A multipart form with one file, written to disk as it arrives and never held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from millstream.core.errors import BadRequest
from millstream.serve.files import Draft, TooLarge

_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 8192
_MAX_HEADERS = 16
# What is written at once, off the event loop.
_WRITE_BYTES = 1 << 20


@dataclass(slots=True)
class Upload:
    """The fields of a form, and the file that came with them as `file`."""

    draft: Draft
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


class _Form:
    """Takes the parser's callbacks: fields are kept, the bytes of the file are queued."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.queued = bytearray()
        self.ended = False
        self._header: list[bytes] = [b"", b""]
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value = bytearray()
        self._in_file = False

    def on_part_begin(self) -> None:
        self._headers, self._value, self._in_file = {}, bytearray(), False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def on_header_end(self) -> None:
        if len(self._headers) >= _MAX_HEADERS:
            raise BadRequest("file", "a part with many headers", f"at most {_MAX_HEADERS}")
        self._headers[self._header[0].lower()] = self._header[1]
        self._header = [b"", b""]

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if not self._name:
            raise BadRequest("file", "a part without a name", "parts of a form, each with its name")
        self._in_file = b"filename" in options
        if self._in_file and (self._name != "file" or self.filename is not None):
            raise BadRequest(self._name, "a file", "one file, in the field file")
        if self._in_file:
            self.filename = options[b"filename"].decode("utf-8", "replace")
        elif len(self.fields) >= _MAX_FIELDS:
            raise BadRequest(self._name, f"more than {_MAX_FIELDS} fields", f"at most {_MAX_FIELDS}")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self.queued += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise BadRequest(self._name, f"more than {_MAX_FIELD_BYTES} bytes", f"at most {_MAX_FIELD_BYTES} bytes")

    def on_part_end(self) -> None:
        if not self._in_file:
            try:
                self.fields[self._name] = self._value.decode("utf-8")
            except UnicodeDecodeError:
                raise BadRequest(self._name, "bytes that are not UTF-8", "text") from None

    def on_end(self) -> None:
        self.ended = True


async def read_upload(
    content_type: str, body: AsyncIterator[bytes], begin: Callable[[], Draft], limit_bytes: int
) -> Upload:
    """Reads a form. Nothing is left behind when it raises: BadRequest, TooLarge (before more is read), DiskTrouble."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise BadRequest("Content-Type", content_type, "multipart/form-data with its boundary")
    form = _Form()
    names = (name for name in dir(form) if name.startswith("on_"))
    parser = MultipartParser(boundary, {name: getattr(form, name) for name in names})  # type: ignore[arg-type]
    draft = await asyncio.to_thread(begin)
    try:
        async for chunk in body:
            parser.write(chunk)
            if draft.size + len(form.queued) > limit_bytes:
                raise TooLarge(f"the file has more than {limit_bytes} bytes, the most that it may have")
            if len(form.queued) >= _WRITE_BYTES:
                data, form.queued = form.queued, bytearray()
                await asyncio.to_thread(draft.write, bytes(data))
        parser.finalize()
        if not form.ended:
            raise BadRequest("file", "a form that ends in its midst", "the whole form")
        if form.queued:
            await asyncio.to_thread(draft.write, bytes(form.queued))
    except MultipartParseError as error:
        draft.drop()
        raise BadRequest("body", str(error), "multipart/form-data") from None
    except BaseException:
        draft.drop()
        raise
    if form.filename is None:
        draft.drop()
        raise BadRequest("file", None, "a file, in the field file")
    return Upload(draft, form.fields, form.filename)
