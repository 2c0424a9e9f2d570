"""What other rooms may rely on from the text room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class TokenBytes(Protocol):
    """Id -> bytes. All that the engine knows of text.

    `size` ids from 0 to size - 1 exist; each has bytes (perhaps none), which never change. `special_ids` are the
    control tokens: they are marks for the model and no part of an answer, though `token_bytes` gives their spelling
    too. The bytes of a sequence are the bytes of its tokens, one after the other. Safe to call from several threads.
    """

    @property
    def size(self) -> int: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@runtime_checkable
class TextCodec(Protocol):
    """Text <-> ids for one model.

    `encode` never returns a control id for text unless `parse_special` is true, save the BOS that `add_bos` asks for
    (None: the model's own rule). Equal text gives equal ids, from any thread. `decode` always returns valid text: bytes
    that are not UTF-8 become U+FFFD. Both raise BadRequest for input of a wrong type or out of range, and nothing else.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def stop_ids(self) -> frozenset[int]: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True, *, continuation: bool = False) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@runtime_checkable
class TokenStream(Protocol):
    """Ids in, text out, as it becomes certain.

    The pieces returned by `push` and `finish`, joined, are the text of all ids. No piece is ever taken back, none ends
    inside a character. The cost of `push` is that of its new ids.
    """

    def push(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...
