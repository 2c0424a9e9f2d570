"""A question to a database, answered by many calls of a small model: the agent of HexGen-Text2SQL's workflows (CHESS).

Which calls there are is found out on the way: the keywords that the model names are looked up side by side, candidates
are executed in SQLite, one that fails or finds nothing is repaired with what SQLite said of it, and every answer that
came out is evaluated. What is written is held to grammars, so that all of it can be executed; whether it is right is
another matter.

A workflow is a generator: it gives the calls that may run side by side, and is sent their texts, in order.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from millstream.core.errors import BadFile
from millstream.core.request import Structured

# As the released traces name them; repairs come as often as `revise` is here.
KEYWORDS, RETRIEVE, CANDIDATE, REVISE = "extract_keywords", "Information Retriever", "generate_candidate", "revise"
UNIT_TEST, EVALUATE = "generate_unit_test", "evaluate"
REPAIRS = 3
STEPS = (KEYWORDS, RETRIEVE, CANDIDATE, *[REVISE] * REPAIRS, UNIT_TEST, EVALUATE)
MAX_KEYWORDS, MAX_ROWS, MAX_VM_STEPS = 3, 50, 2_000_000
TESTS = ("one number", "one text", "several rows")


@dataclass(frozen=True, slots=True)
class Ask:
    """One call: its step, its prompt, and what its output must look like."""

    stage: str
    prompt: str
    form: Structured
    max_tokens: int = 40


@dataclass(frozen=True, slots=True)
class Found:
    """What became of a statement: rows, or what SQLite said of it."""

    sql: str
    rows: tuple[tuple[object, ...], ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The statement that was chosen, and how often one was repaired and one ended in an error."""

    found: Found
    repairs: int
    errors: int


Workflow = Generator[list[Ask], list[str], Answer]


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    sql: str


def questions(path: Path, database: str) -> list[Question]:
    """Those of one database, from lines of {"database", "question", "sql"}. Raises BadFile."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [Question(row["question"], row["sql"]) for row in rows if row["database"] == database]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(path, f"is no list of questions: {error}") from error


class Database:
    """A SQLite file that is read only, for one thread."""

    def __init__(self, path: Path) -> None:
        """Raises BadFile."""
        self.connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        try:
            names = [
                str(row[0]) for row in self.connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            ]
            self.columns = {
                name: [str(row[1]) for row in self.connection.execute(f'PRAGMA table_info("{name}")')] for name in names
            }
        except sqlite3.DatabaseError as error:
            raise BadFile(path, f"is no database: {error}") from error
        self.schema = "\n".join(f"{table}({', '.join(columns)})" for table, columns in self.columns.items())
        self.grammar = Structured.grammar(_grammar(self.columns))

    def close(self) -> None:
        self.connection.close()

    def run(self, sql: str, values: Sequence[object] = ()) -> Found:
        """Executes a statement: the first MAX_ROWS rows. One that takes too long ends in an error, like a wrong one."""
        self.connection.set_progress_handler(lambda: 1, MAX_VM_STEPS)
        try:
            return Found(sql, tuple(self.connection.execute(sql, tuple(values)).fetchmany(MAX_ROWS)))
        except sqlite3.Error as error:
            return Found(sql, error=str(error))


def _grammar(columns: dict[str, list[str]]) -> str:
    """SELECT statements over any of the tables with any of the columns: well formed, not always with a meaning."""

    def one_of(names: Sequence[str]) -> str:
        return " | ".join(json.dumps(name) for name in names)

    return "\n".join(
        [
            'start: "SELECT " what " FROM " table join? where? group? order? ";"',
            'what: "COUNT(*)" | term (", " term)?',
            'term: column | func "(" column ")"',
            'func: "COUNT" | "AVG" | "SUM" | "MIN" | "MAX" | "DISTINCT"',
            'join: " JOIN " table " ON " table "." column " = " table "." column',
            'where: " WHERE " test (" AND " test)?',
            'test: column " " compare " " value',
            'compare: "=" | ">" | "<" | "LIKE"',
            "value: NUMBER | TEXT",
            'group: " GROUP BY " column',
            'order: " ORDER BY " column " DESC"? " LIMIT " COUNT',
            f"table: {one_of(list(columns))}",
            f"column: {one_of(list(dict.fromkeys(name for own in columns.values() for name in own)))}",
            "NUMBER: /[0-9]{1,8}/",
            "COUNT: /[1-9]/",
            "TEXT: /'[A-Za-z%][A-Za-z% ]{0,18}'/",
        ]
    )


def workflow(database: Database, question: str, shown: Sequence[Question]) -> Workflow:
    """Answers a question; `shown` are questions with their statements that the model is shown, two or more."""
    ask = f"Question: {question}\n"
    words = Structured.regex(rf"[A-Za-z]{{2,12}}(, [A-Za-z]{{2,12}}){{0,{MAX_KEYWORDS - 1}}}\.")
    (text,) = yield [
        Ask(
            KEYWORDS, f"Question: Which cities of Chile are large?\nKeywords: cities, Chile.\n{ask}Keywords:", words, 16
        )
    ]
    keywords = list(dict.fromkeys(word.strip(" .") for word in text.split(",") if word.strip(" .")))
    places = [f"{table}.{column}" for table, columns in database.columns.items() for column in columns]
    which = Structured.choice([f" {place}" for place in places])
    texts = yield [
        Ask(RETRIEVE, f"{database.schema}\n{ask}The column that tells of {word} is", which, 16) for word in keywords
    ]
    known = []
    for word, place in zip(keywords, texts, strict=True):
        table, _, column = place.strip().partition(".")
        if column in database.columns.get(table, ()):
            sql = f'SELECT DISTINCT "{column}" FROM "{table}" WHERE "{column}" LIKE ? LIMIT 2'
            known += [f"{column} can be '{row[0]}'" for row in database.run(sql, [f"%{word}%"]).rows]
    told = "".join(f"{line}\n" for line in known)
    head = f"{database.schema}\n{told}"
    examples = [f"Question: {one.text}\nSQL: {one.sql.replace('`', '')};\n" for one in shown]
    prompts = dict.fromkeys(f"{head}{example}{ask}SQL: " for example in examples)
    candidates = yield [Ask(CANDIDATE, prompt, database.grammar) for prompt in prompts]
    found = [database.run(sql) for sql in dict.fromkeys(candidates)]
    errors, repairs = sum(bool(one.error) for one in found), 0
    for place, one in enumerate(found):
        while not one.rows and repairs < REPAIRS:
            repairs += 1
            said = one.error or "no rows"
            prompt = f"{head}{ask}SQL: {one.sql}\nSQLite: {said}\nA different statement:\nSQL: "
            (sql,) = yield [Ask(REVISE, prompt, database.grammar)]
            again = sql == one.sql
            one = database.run(sql)
            errors += bool(one.error)
            if again:
                break
        found[place] = one
    kind = (yield [Ask(UNIT_TEST, f"{ask}The answer is", Structured.choice([f" {test}" for test in TESTS]), 8)])[0]
    able = [one for one in found if not one.error] or found[:1]
    yes = Structured.choice([" yes", " no"])
    marks = yield [
        Ask(EVALUATE, f"{ask}SQL: {one.sql}\nAnswer: {one.error or one.rows[:3]}\nIs that right?", yes, 4)
        for one in able
    ]
    scores = [(mark.strip() == "yes") + _fits(one, kind.strip()) for one, mark in zip(able, marks, strict=True)]
    return Answer(able[scores.index(max(scores))], repairs, errors)


def _fits(found: Found, test: str) -> bool:
    """Whether rows are of the kind that a unit test asks for."""
    single = len(found.rows) == len(found.rows[0]) == 1 if found.rows else False
    number = single and isinstance(found.rows[0][0], int | float)
    return {"one number": number, "one text": single and not number, "several rows": len(found.rows) > 1}[test]
