"""Routers and the books of a cluster."""

from __future__ import annotations

import pytest

from millstream.cluster.fleet import Fleet, NoEngine
from millstream.cluster.prefixes import PrefixMap
from millstream.cluster.protocol import Done, Member
from millstream.core import registry
from millstream.core.registry import Choice
from millstream.core.request import Program, Request, Tokens

ROUTERS = registry.names("router")


def fleet(name, speeds=(1.0, 1.0, 1.0), **options):
    members = [Member(place, f"engine {place}", speed) for place, speed in enumerate(speeds)]
    return Fleet(registry.make("router", Choice(name, options)), members)


def request(number, tokens=(), length=10, session="", affinity=""):
    program = Program(session, number) if session else None
    prompt = Tokens(tuple(tokens) or tuple(range(number * 1000, number * 1000 + length)))
    return Request(number, (prompt,), program=program, affinity=affinity)


@pytest.mark.parametrize("name", ROUTERS)
def test_whoever_picks_the_books_add_up_and_only_those_that_are_up_get_anything(name):
    books = fleet(name)
    for number in range(1, 31):
        books.send(request(number, session=f"s{number % 4}"), float(number))
    assert sum(member.requests for member in books.members) == len(books) == 30
    again = books.lost(1, 31.0)
    assert books.members[1].requests == 0 and books.members[1].prompt_tokens == 0
    for one in again:
        _, place = books.send(one, 32.0)
        assert place != 1
    for number in range(1, 31):
        assert books.place_of(number) in (0, 2)
        books.ended(number, Done(5, 0, 0.1), 40.0)
        books.ended(number, Done(5), 40.0)
    assert [member.requests for member in books.members] == [0, 0, 0]
    assert [member.prompt_tokens for member in books.members] == [0, 0, 0]
    books.lost(0, 41.0)
    books.lost(2, 41.0)
    with pytest.raises(NoEngine):
        books.send(request(99), 42.0)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_requests_go_to_the_same_places(name):
    def places():
        books = fleet(name)
        return [books.send(request(n, length=5 + n * 7 % 90, session=f"s{n % 3}"), float(n))[1] for n in range(1, 40)]

    assert places() == places()


def test_round_robin_takes_turns_by_place():
    books = fleet("round-robin")
    assert [books.send(request(n), 0.0)[1] for n in range(1, 5)] == [0, 1, 2, 0]
    books.lost(1, 0.0)
    assert [books.send(request(n), 0.0)[1] for n in range(5, 8)] == [2, 0, 2]


def test_least_work_counts_what_each_can_do():
    books = fleet("least-work", speeds=(1.0, 4.0))
    places = [books.send(request(n), 0.0)[1] for n in range(1, 11)]
    assert places.count(1) == 8


def test_calls_of_a_program_stay_together():
    books = fleet("session")
    places = {n: books.send(request(n, session="ab"[n % 2]), 0.0)[1] for n in range(1, 11)}
    assert {places[n] for n in places if n % 2} == {places[1]} and {places[n] for n in (2, 4, 6)} == {places[2]}
    assert places[1] != places[2]


def test_requests_of_one_affinity_stay_together_until_their_engine_has_much_more_to_do():
    books = fleet("session", more=4, times=1.5)
    first = books.send(request(1, affinity="a"), 0.0)[1]
    other = books.send(request(2, affinity="b"), 0.0)[1]
    assert first != other
    assert [books.send(request(n, affinity="a"), 0.0)[1] for n in range(3, 7)] == [first] * 4
    aside = {books.send(request(n, affinity="a"), 0.0)[1] for n in range(7, 10)}
    assert aside - {first}
    # A program goes where its first call went, whatever affinity its calls have.
    begun = books.send(request(10, session="p"), 0.0)[1]
    assert books.send(request(11, session="p", affinity="b"), 0.0)[1] == begun
    assert books.send(request(12, affinity="b"), 0.0)[1] == other


@pytest.mark.parametrize("gone", ["lost", "drained"])
def test_an_affinity_whose_engine_is_lost_or_drained_finds_another_and_stays_there(gone):
    books = fleet("session")
    place = books.send(request(1, affinity="a"), 0.0)[1]
    if gone == "lost":
        books.lost(place, 1.0)
    else:
        assert not books.drain(place)
    found = {books.send(request(n, affinity="a"), 2.0)[1] for n in range(2, 6)}
    assert len(found) == 1 and place not in found


def test_a_prefix_is_sought_where_it_was_sent_until_loads_are_out_of_balance():
    books = fleet("prefix-affinity", more=4, times=1.5)
    shared = tuple(range(640))
    first = books.send(request(1, shared), 0.0)[1]
    places = [books.send(request(n, (*shared, n, n)), 0.0)[1] for n in range(2, 6)]
    assert places == [first] * 4
    others = {books.send(request(n, (*shared, n, n)), 0.0)[1] for n in range(6, 10)}
    assert others - {first}


def test_a_prefix_map_knows_whole_blocks_and_forgets_the_ends_first():
    known = PrefixMap(block=4, most=3)
    names = known.chain(range(14))
    assert len(names) == 3 and known.chain(range(14), "salt") != names
    known.insert(names, 0)
    assert known.matched(known.chain(range(9)), 0) == 8 and known.matched(names, 1) == 0
    known.insert(known.chain([99] * 4), 0)
    assert known.matched(names, 0) == 8
    known.lost(0)
    assert known.matched(names, 0) == 0


def test_a_tenant_stays_where_its_prefix_is_until_its_share_of_that_engine_is_used_up():
    books = fleet("d2lpm", quantum=1000.0)
    shared = tuple(range(640))
    first = books.send(request(1, shared), 0.0)[1]
    places = []
    for number in range(2, 12):
        places.append(books.send(request(number, (*shared, *range(number * 5000, number * 5000 + 64))), 0.0)[1])
        books.ended(number, Done(60), 0.0)
    assert places[0] == first and set(places) == {0, 1, 2}
    router = books.router
    assert all(deficit <= 1000.0 for deficit in router._deficits[""].values())


def test_a_large_share_is_the_longest_prefix_alone_and_who_holds_nothing_is_no_reason():
    books = fleet("d2lpm", quantum=1e9)
    shared = tuple(range(640))
    first = books.send(request(1, shared), 0.0)[1]
    assert {books.send(request(n, (*shared, n)), 0.0)[1] for n in range(2, 12)} == {first}
    assert books.send(request(50), 0.0)[1] != first


def test_what_a_program_was_served_goes_with_its_calls_and_long_ones_stay_together():
    books = fleet("autellix", short=100, count="plas")
    sent, place = books.send(request(1, length=300, session="p"), 0.0)
    assert sent.program.service_s == 0.0
    books.ended(1, Done(5, service_s=2.0), 1.0)
    again, same = books.send(request(2, length=400, session="p"), 1.0)
    assert again.program.service_s == 2.0 and same == place
    other = books.send(request(3, length=300, session="q"), 1.0)[1]
    assert other != place
    assert books.send(request(4, length=50, session="p"), 1.0)[1] not in (place, other)
