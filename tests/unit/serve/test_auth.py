"""API keys: how they are written, that hashes alone are kept, and that a lookup tells nothing of the others."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path

import pytest

from millstream.core.errors import BadFile, ConfigError
from millstream.serve.auth import Keyring, entries_of, key_given, new_key, sealed
from millstream.serve.caller import Overloaded
from millstream.serve.config import AuthConfig


def tenant(ring: Keyring, key: str) -> str | None:
    return asyncio.run(ring.tenant(key))


def test_a_key_that_is_made_cannot_be_guessed_and_is_kept_as_a_fast_hash() -> None:
    key = new_key()
    assert key.startswith("ms-") and len(key) >= 46 and key != new_key()
    line = sealed(f"alice:{key}")
    assert line.startswith("alice:sha256:") and key not in line
    assert tenant(Keyring([line]), key) == "alice"
    assert sealed(line) == line


def test_a_key_that_was_chosen_is_kept_as_a_slow_hash() -> None:
    one, two = sealed("bob:correct horse"), sealed("bob:correct horse")
    assert one.startswith("bob:scrypt:") and one != two, "each has a salt of its own"
    ring = Keyring([one])
    assert tenant(ring, "correct horse") == "bob"
    assert tenant(ring, "correct hors") is None
    began = time.perf_counter()
    for _ in range(100):
        assert tenant(ring, "correct horse") == "bob"
    assert time.perf_counter() - began < 1, "it is hashed slowly once"
    ring.close()


def test_names_and_nameless_keys() -> None:
    ring = Keyring(["alice:secret-of-alice", "alice:other-of-alice", "nameless-key", sealed("bob:" + "ms-" + "b" * 43)])
    assert len(ring) == 4
    assert tenant(ring, "secret-of-alice") == tenant(ring, "other-of-alice") == "alice"
    assert tenant(ring, "ms-" + "b" * 43) == "bob"
    named = tenant(ring, "nameless-key")
    assert named is not None and named.startswith("key-")


@pytest.mark.parametrize(
    "given",
    ["", "x", "secret-of-alic", "secret-of-alice ", "SECRET-OF-ALICE", "alice:secret-of-alice", "é" * 20, "k" * 600],
)
def test_what_is_no_key(given: str) -> None:
    assert tenant(Keyring(["alice:secret-of-alice"]), given) is None
    assert tenant(Keyring([]), given) is None


@pytest.mark.parametrize(
    "entry",
    ["short", "alice:short", "al ice:long-enough-key", "alice:sha256:1234", "alice:scrypt:00:11", "sha256:" + "0" * 64,
     "a" * 65 + ":long-enough-key", "alice:naïve-long-key", "alice:" + "x" * 600],
)  # fmt: skip
def test_entries_that_are_wrong_are_refused_without_showing_them(entry: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sealed(entry)
    secret = entry.rpartition(":")[2]
    assert secret not in str(caught.value) or len(secret) < 5


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# who may come in\n\n{sealed('alice:secret-of-alice')}\nbob:secret-of-bob\n")
    entries = entries_of(AuthConfig(keys=("carol:secret-of-carol",), file=str(path)))
    ring = Keyring(entries)
    assert [tenant(ring, f"secret-of-{name}") for name in ("alice", "bob", "carol")] == ["alice", "bob", "carol"]
    with pytest.raises(BadFile):
        entries_of(AuthConfig(file=str(tmp_path / "nothing")))


def test_many_new_keys_at_once_do_not_pile_up() -> None:
    ring = Keyring([sealed("bob:correct horse")])

    async def flood() -> list[object]:
        return await asyncio.gather(*(ring.tenant(f"guess number {n}") for n in range(40)), return_exceptions=True)

    found = asyncio.run(flood())
    refused = [one for one in found if isinstance(one, Overloaded)]
    assert len(refused) == 24 and all(one.status == 429 for one in refused)
    assert found.count(None) == 16
    ring.close()


def test_the_time_of_a_lookup_does_not_tell_how_near_a_key_was() -> None:
    """10 000 lookups of keys that are wrong in the last letter, and in all of them."""
    key = new_key()
    ring = Keyring([f"alice:{key}", *(f"t{n}:{new_key()}" for n in range(20))])
    near, far = key[:-1] + ("A" if key[-1] != "A" else "B"), new_key()
    took: dict[str, list[int]] = {near: [], far: [], key: []}
    order = [near, far, key] * 3500
    random.Random(0).shuffle(order)
    for given in order:
        began = time.perf_counter_ns()
        ring.find(given)
        took[given].append(time.perf_counter_ns() - began)
    medians = {name: statistics.median(times) for name, times in took.items()}
    spread = max(medians.values()) - min(medians.values())
    assert spread < 0.05 * min(medians.values()) + 200, medians


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "key"),
    [
        (b"Bearer abc", None, "abc"), (b"bearer  abc ", None, "abc"), (b"Basic abc", None, ""), (b"abc", None, ""),
        (None, b"xyz", "xyz"), (b"Bearer abc", b"xyz", "abc"), (b"Bearer", b"xyz", "xyz"), (None, None, ""),
    ],
)  # fmt: skip
def test_where_a_key_is_found(authorization: bytes | None, x_api_key: bytes | None, key: str) -> None:
    assert key_given(authorization, x_api_key) == key


@pytest.mark.long
def test_the_time_of_a_lookup_tells_nothing_of_how_near_a_key_is() -> None:
    """10,000 lookups of a key that is wrong in its last character and of one that is wrong in all, in random order:
    the rank-sum test sees no difference."""
    key = new_key()
    ring = Keyring([*(f"t{place}:{new_key()}" for place in range(8)), f"alice:{key}"])
    near, far = key[:-1] + ("A" if key[-1] != "A" else "B"), "ms-" + "".join("A" if c != "A" else "B" for c in key[3:])
    order = [near] * 10_000 + [far] * 10_000
    random.Random(5).shuffle(order)
    taken = []
    for given in order:
        began = time.perf_counter_ns()
        found = ring.find(given)
        taken.append(time.perf_counter_ns() - began)
        assert found is None
    ranks = {place: rank for rank, place in enumerate(sorted(range(len(taken)), key=taken.__getitem__))}
    n = len(order) // 2
    u = sum(ranks[place] for place, given in enumerate(order) if given is near) - n * (n - 1) / 2
    z = (u - n * n / 2) / (n * n * (2 * n + 1) / 12) ** 0.5
    assert abs(z) < 4, f"z = {z:.1f}"
