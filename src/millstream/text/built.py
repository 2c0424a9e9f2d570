"""A finished tokenizer as two lines of text: its facts, and the `tokenizers` library's JSON. Kept on disk by checksum.

The second line's SHA-256 stands in the first, so a damaged file is found before the library sees it and is built anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from millstream.core.errors import BadFile
from millstream.text.tokenizer import Facts, Special, Tokenizer

FORMAT = 1
"""Raised whenever the building of tokenizers changes, so that older files are left alone."""

_log = logging.getLogger(__name__)
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def backend_from(spec: str, path: str | Path) -> Backend:
    """The library's tokenizer from its JSON. Raises BadFile, naming `path`, for JSON that it refuses."""
    try:
        backend = Backend.from_str(spec)
        # Where control tokens had to stay in the library's list (Unigram), it must not find them in text.
        backend.encode_special_tokens = True
        return backend
    except BaseException as error:
        # The library's panics do not derive from Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BadFile(path, f"the tokenizer cannot be built: {error}") from None


def cached(
    cache_dir: str | Path | None,
    key: str,
    path: str | Path,
    build: Callable[[], tuple[str, Facts]],
    refresh: Callable[[Facts], Facts] = lambda facts: facts,
) -> Tokenizer:
    """The tokenizer kept under `key` in `cache_dir`, else the one that `build` gives, which is then kept.

    `refresh` brings facts that are cheap to know (ids of BOS and EOS, templates) up to date with the model file. A
    cache that cannot be written costs time at the next start and nothing else.
    """
    if cache_dir is None:
        return _new(build, path)[0]
    name = key if _KEY.fullmatch(key) else hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
    file = Path(cache_dir) / f"{name}.v{FORMAT}.tokenizer"
    kept = _read(file)
    if kept is not None:
        spec, facts = kept
        try:
            return Tokenizer(backend_from(spec, file), refresh(facts))
        except BadFile as error:
            _log.warning("%s; building it anew", error)
    tokenizer, spec = _new(build, path)
    _write(file, spec, tokenizer.facts)
    return tokenizer


def save(file: Path, spec: str, facts: Facts) -> None:
    """Writes a finished tokenizer. Raises OSError."""
    file.write_bytes(_content(spec, facts))


def load(file: Path) -> Tokenizer:
    """What `save` wrote. Raises BadFile."""
    kept = _read(file)
    if kept is None:
        raise BadFile(file, "does not hold a whole tokenizer of this version")
    return Tokenizer(backend_from(kept[0], file), kept[1])


def _new(build: Callable[[], tuple[str, Facts]], path: str | Path) -> tuple[Tokenizer, str]:
    spec, facts = build()
    backend = backend_from(spec, path)
    for token in json.loads(spec)["added_tokens"]:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise BadFile(path, f"the token {token['content']!r} cannot have the id {token['id']}")
    return Tokenizer(backend, facts), spec


def _read(file: Path) -> tuple[str, Facts] | None:
    try:
        head, _, body = file.read_bytes().partition(b"\n")
        header = json.loads(head)
        if header["format"] != FORMAT or header["sha256"] != hashlib.sha256(body).hexdigest():
            raise ValueError("it does not have the content that was written")
        return body.decode("utf-8"), _facts_from(header["facts"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.warning("%s: the kept tokenizer cannot be used (%s); building it anew", file, error)
        return None


def _content(spec: str, facts: Facts) -> bytes:
    body = spec.encode("utf-8")
    header = {"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest(), "facts": _facts_to(facts)}
    return json.dumps(header, ensure_ascii=False).encode("utf-8") + b"\n" + body


def _write(file: Path, spec: str, facts: Facts) -> None:
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "wb") as out:
            out.write(_content(spec, facts))
        os.replace(temporary, file)
        temporary = None
    except OSError as error:
        _log.warning("%s: the tokenizer is not kept (%s)", file, error)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _facts_to(facts: Facts) -> dict[str, Any]:
    return {
        "size": facts.size,
        "spelling": facts.spelling,
        "specials": [[text, s.id, s.lstrip, s.rstrip] for text, s in facts.specials.items()],
        "bos_id": facts.bos_id,
        "eos_id": facts.eos_id,
        "pad_id": facts.pad_id,
        "unk_id": facts.unk_id,
        "add_bos": facts.add_bos,
        "prefix": facts.prefix,
        "strip_prefix": facts.strip_prefix,
        "stop_ids": sorted(facts.stop_ids),
        "chat_templates": dict(facts.chat_templates),
        "last_id": facts.last_id,
    }


def _facts_from(kept: dict[str, Any]) -> Facts:
    specials = {text: Special(i, lstrip, rstrip) for text, i, lstrip, rstrip in kept["specials"]}
    return Facts(**{**kept, "specials": specials, "stop_ids": frozenset(kept["stop_ids"])})
