"""Text that comes in pieces is the text that comes at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CORPUS, small_tokenizer, tokenizer_of
from millstream.core.errors import BadRequest
from millstream.text.detokenizer import Detokenizer
from millstream.text.protocol import TextCodec, TokenBytes, TokenStream
from millstream.text.vocabulary import Vocabulary

BYTES = Vocabulary.from_bytes([bytes([n]) for n in range(256)])


def cut(ids: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]  # noqa: RUF007


@pytest.mark.parametrize("kind", ["bpe", "spm", "spm-plain"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_joined_are_the_whole_decode_for_every_cut(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=10))
    skip, continuation = data.draw(st.booleans()), data.draw(st.booleans())
    stream = Detokenizer(tokenizer, skip, continuation=continuation)
    pieces = [stream.push(part) for part in cut(ids, cuts)]
    pieces.append(stream.finish())
    assert "".join(pieces) == tokenizer.decode(ids, skip, continuation=continuation)
    "".join(pieces).encode("utf-8")


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=24) | st.text(max_size=8).map(str.encode))
def test_any_bytes_one_at_a_time_decode_as_at_once(data: bytes) -> None:
    stream = Detokenizer(BYTES)
    pieces = [stream.push([byte]) for byte in data]
    for n in range(len(data)):
        done = "".join(pieces[: n + 1])
        # Nothing is given out early: what is out is how the whole begins.
        assert data.decode("utf-8", "replace").startswith(done)
    assert "".join(pieces) + stream.finish() == data.decode("utf-8", "replace")


def test_a_character_is_held_until_it_is_whole() -> None:
    stream = Detokenizer(BYTES)
    assert [stream.push([byte]) for byte in "é🎉".encode()] == ["", "é", "", "", "", "🎉"]
    assert stream.finish() == ""
    assert stream.push([0xF0, 0x9F]) == "" and stream.finish() == "�"
    assert Detokenizer(BYTES).push([0xFF, 0x41]) == "�A"


def test_real_texts_stream_token_by_token() -> None:
    for name in ("smollm2-135m", "gemma3-270m"):
        tokenizer = tokenizer_of(name)
        for text in CORPUS:
            ids = tokenizer.encode(text)
            stream = Detokenizer(tokenizer)
            assert "".join(stream.push([i]) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_wrong_ids_name_the_range() -> None:
    with pytest.raises(BadRequest, match="0 to 255"):
        Detokenizer(BYTES).push([256])


def test_the_room_keeps_its_promises() -> None:
    tokenizer = small_tokenizer("bpe")
    assert isinstance(tokenizer, TextCodec)
    assert isinstance(tokenizer.vocabulary, TokenBytes)
    assert isinstance(Detokenizer(tokenizer), TokenStream)


def test_a_vocabulary_looks_each_id_up_once_and_only_when_asked() -> None:
    asked: list[int] = []
    vocabulary = Vocabulary(10**6, lambda i: asked.append(i) or b"x", [3])  # type: ignore[func-returns-value]
    assert asked == []
    assert vocabulary.token_bytes(7) == vocabulary[7] == b"x"
    assert asked == [7] and len(vocabulary) == 10**6 and vocabulary.is_special(3)
