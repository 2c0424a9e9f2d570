"""The agent that answers questions over a database: which calls there are is found out by executing statements."""

from __future__ import annotations

import sqlite3

import pytest

from millstream.bench import text2sql
from millstream.bench.text2sql import CANDIDATE, EVALUATE, KEYWORDS, RETRIEVE, REVISE, UNIT_TEST, Question
from millstream.core.errors import BadFile

SHOWN = [Question("How many?", "SELECT COUNT(*) FROM `city`"), Question("Which?", "SELECT `Name` FROM `city`")]


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "towns.sqlite"
    with sqlite3.connect(path) as made:
        made.executescript(
            "CREATE TABLE city (Name TEXT, People INTEGER); CREATE TABLE land (Code TEXT, Capital TEXT);"
            "INSERT INTO city VALUES ('Lima', 9), ('Quito', 2); INSERT INTO land VALUES ('PE', 'Lima')"
        )
    made.close()
    own = text2sql.Database(path)
    yield own
    own.close()


def play(database, says):
    """The calls of each wave of a workflow whose model says so, by step, and what it came to."""
    flow = text2sql.workflow(database, "How large is Lima?", SHOWN)
    waves, asks = [], next(flow)
    while True:
        waves.append(asks)
        try:
            asks = flow.send([says[ask.stage].pop(0) for ask in asks])
        except StopIteration as end:
            return waves, end.value


def test_a_statement_that_fails_is_repaired_with_what_sqlite_said(database):
    says = {
        KEYWORDS: ["Lima, large."],
        RETRIEVE: [" city.Name", " city.People"],
        CANDIDATE: ["SELECT Capital FROM city;", "SELECT People FROM city WHERE Name = 'Rome';"],
        REVISE: [
            "SELECT Name FROM city WHERE People > 100;",
            "SELECT People FROM city WHERE Name = 'Lima';",
            "SELECT COUNT(*) FROM city;",
        ],
        UNIT_TEST: [" one number"],
        EVALUATE: [" no", " no"],
    }
    waves, answer = play(database, says)
    stages = [[ask.stage for ask in wave] for wave in waves]
    assert stages == [
        [KEYWORDS],
        [RETRIEVE] * 2,
        [CANDIDATE] * 2,
        [REVISE],
        [REVISE],
        [REVISE],
        [UNIT_TEST],
        [EVALUATE] * 2,
    ]
    assert "Name can be 'Lima'" in waves[2][0].prompt, "the keyword was looked up in the column that was named"
    assert "no such column: Capital" in waves[3][0].prompt and "no rows" in waves[4][0].prompt
    assert (answer.repairs, answer.errors) == (3, 1)
    assert answer.found.rows == ((9,),), "of equal marks the first"


def test_candidates_that_are_one_and_the_same_are_executed_and_evaluated_once(database):
    says = {
        KEYWORDS: ["Lima."],
        RETRIEVE: [" city.Name"],
        CANDIDATE: ["SELECT Name FROM city;"] * 2,
        UNIT_TEST: [" several rows"],
        EVALUATE: [" yes"],
    }
    waves, answer = play(database, says)
    assert [len(wave) for wave in waves] == [1, 1, 2, 1, 1]
    assert (answer.found.rows, answer.repairs) == ((("Lima",), ("Quito",)), 0)


def test_a_repair_that_changes_nothing_is_the_last_of_its_candidate(database):
    wrong = "SELECT Code FROM city;"
    says = {
        KEYWORDS: ["Lima."],
        RETRIEVE: [" land.Code"],
        CANDIDATE: [wrong] * 2,
        REVISE: [wrong],
        UNIT_TEST: [" one text"],
        EVALUATE: [" yes"],
    }
    _, answer = play(database, says)
    assert (answer.repairs, answer.errors, answer.found.error) == (1, 2, "no such column: Code")


def test_nothing_can_be_written_and_what_never_ends_is_stopped(database):
    assert "readonly" in database.run("DELETE FROM city").error
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n"
    assert database.run(endless).error == "interrupted"


def test_damaged_files_are_told_by_their_names(tmp_path):
    path = tmp_path / "x"
    path.write_text("this is neither of them, and long enough to be seen as none" * 40)
    with pytest.raises(BadFile, match="no database"):
        text2sql.Database(path)
    with pytest.raises(BadFile, match="no list of questions"):
        text2sql.questions(path, "towns")


def test_the_grammar_takes_statements_of_the_schema_and_no_others(database):
    llguidance = pytest.importorskip("llguidance")
    source = llguidance.LLMatcher.grammar_from_lark(database.grammar.text)
    tokenizer = llguidance.LLTokenizer("byte")
    for sql, taken in (
        ("SELECT Name, MAX(People) FROM city WHERE People > 3 GROUP BY Name ORDER BY People DESC LIMIT 2;", True),
        ("SELECT Capital FROM city JOIN land ON land.Capital = city.Name WHERE Code LIKE 'P%';", True),
        ("SELECT Street FROM city;", False),
        ("DROP TABLE city;", False),
    ):
        matcher = llguidance.LLMatcher(tokenizer, source)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.tokenize_str(sql)
        assert (matcher.try_consume_tokens(ids) == len(ids)) is taken, sql
