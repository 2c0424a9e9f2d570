from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from synthetic_experiment import Synthetic

from millstream.config.schema import EngineConfig
from millstream.core import registry
from millstream.core.errors import BadFile, ConfigError, UnknownName
from millstream.core.registry import Card
from millstream.reproduce import commands, docs, harness, ledger, papers
from millstream.reproduce.papers import PAPERS


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> ledger.Record:
    folder = tmp_path_factory.mktemp("source")
    return harness.run(Synthetic(folder), root=folder)


@pytest.fixture
def tree(tmp_path: Path, record: ledger.Record) -> Path:
    """A source root with the synthetic technique and an empty folder of records."""
    (tmp_path / "technique.py").write_text("SPEED = 2\n")
    (tmp_path / "records").mkdir()
    return tmp_path


def standing(tree: Path, record: ledger.Record) -> ledger.Standing:
    ledger.write(record, tree / "records" / f"{record.name}.json")
    return ledger.standing(papers.find(record.name), tree / "records", tree)


def test_all_79_papers_are_listed_once() -> None:
    assert [paper.number for paper in PAPERS] == list(range(1, 80))
    names = [paper.name for paper in PAPERS]
    assert len(set(names)) == 79
    assert all(name == name.lower() and name.replace("-", "").isalnum() for name in names)
    fixed = {1: "hexgen-text2sql", 4: "intel-gpu", 10: "relayattention", 11: "pagedattention", 15: "s3", 19: "fastgen"}
    fixed |= {25: "hydragen", 27: "qserve", 29: "cloud-native", 32: "fp6-llm", 42: "autellix", 57: "nexus", 58: "hygen"}
    fixed |= {61: "ltr", 64: "dlpm"}
    assert {number: names[number - 1] for number in fixed} == fixed


def test_no_record_is_not_yet(tree: Path) -> None:
    one = ledger.standing(papers.find("hydragen"), tree / "records", tree)
    assert (one.state, one.measured, one.record) == ("not yet", None, None)


def test_a_full_passing_record_works(tree: Path, record: ledger.Record) -> None:
    one = standing(tree, record)
    assert (one.state, one.measured) == ("works", record.date[:10])


@pytest.mark.parametrize(("verdict", "state"), [("partly", "partly"), ("failed", "failed"), ("void", "failed")])
def test_the_state_follows_the_verdict(tree: Path, record: ledger.Record, verdict: ledger.Verdict, state: str) -> None:
    assert standing(tree, dataclasses.replace(record, verdict=verdict, why=("because",))).state == state


def test_a_quick_record_never_works(tree: Path, record: ledger.Record) -> None:
    for verdict in ("works", "partly"):
        one = standing(tree, dataclasses.replace(record, quick=True, verdict=verdict))  # type: ignore[arg-type]
        assert one.state == "not yet"
    assert standing(tree, dataclasses.replace(record, quick=True, verdict="failed")).state == "failed"


def test_the_word_works_alone_does_not_make_one(tree: Path, record: ledger.Record) -> None:
    failed = tuple(dataclasses.replace(row, outcome="failed") for row in record.required)
    wrong = tuple(dataclasses.replace(row, passed=False) for row in record.checks)
    for edited in ({"required": failed}, {"checks": wrong}, {"checks": ()}, {"order": record.order[:4]}):
        assert standing(tree, dataclasses.replace(record, **edited)).state == "failed"


def test_a_changed_file_is_stale_and_a_restored_one_is_not(tree: Path, record: ledger.Record) -> None:
    assert standing(tree, record).state == "works"
    source = tree / "technique.py"
    source.write_text("SPEED = 3\n")
    one = standing(tree, record)
    assert (one.state, one.reason) == ("stale", "changed since it was measured: technique.py")
    assert one.measured == record.date[:10]
    source.unlink()
    assert standing(tree, record).state == "stale"
    source.write_text("SPEED = 2\n")
    assert standing(tree, record).state == "works"


def test_a_record_whose_list_of_files_was_edited_is_stale(tree: Path, record: ledger.Record) -> None:
    assert standing(tree, dataclasses.replace(record, files={})).state == "stale"
    other = {name: "0" * 64 for name in record.files}
    assert standing(tree, dataclasses.replace(record, files=other)).state == "stale"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"schema": 99}', b'{"schema": 1, "name": "pagedattention"}'])
def test_a_damaged_record_is_a_typed_error_and_never_works(tree: Path, content: bytes) -> None:
    path = tree / "records" / "pagedattention.json"
    path.write_bytes(content)
    with pytest.raises(BadFile):
        ledger.read(path)
    assert ledger.standing(papers.find("pagedattention"), tree / "records", tree).state == "failed"


def test_a_record_under_another_name_is_refused(tree: Path, record: ledger.Record) -> None:
    ledger.write(record, tree / "records" / "fastgen.json")
    with pytest.raises(BadFile, match="pagedattention"):
        ledger.latest("fastgen", tree / "records")


def test_committed_records_are_readable_and_private_data_free() -> None:
    for path in ledger.RECORDS.glob("*.json"):
        found = ledger.latest(path.stem)
        assert found is not None
        assert "/home/" not in path.read_text()


def test_cards_read_from_source_are_those_of_the_modules() -> None:
    """Where a module needs what is not installed here (a GPU library), the reading stands alone."""
    placed = {(where.point, where.card.name): where.card for where in papers.plugin_cards()}
    assert placed
    for point in registry.points():
        if point == "experiment":
            continue
        for name in registry.names(point):
            try:
                card = registry.card(point, name)
            except ImportError:
                continue
            assert placed[point, card.name] == card


def test_a_card_that_is_not_literal_is_not_guessed(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text('CARD = Card("x", "sum", paper=11, needs=("kv:plain",), lossless=False, error="1e-3")\n')
    assert papers.read_card(source) == Card("x", "sum", 11, False, "1e-3", ("kv:plain",))
    source.write_text("CARD = 3\n")
    assert papers.read_card(source) is None


def test_a_switch_names_the_plugins_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (papers.PlacedCard("policy", Card("autellix", "...", paper=42)),)
    monkeypatch.setattr(papers, "plugin_cards", lambda: cards)
    assert papers.find("autellix").switch == "`sched.policies=autellix`"
    assert papers.find("petals").switch == "-"


def test_every_switch_is_a_config_key() -> None:
    for key in papers.SWITCHES.values():
        at: object = EngineConfig()
        for part in key.split("."):
            at = getattr(at, part)


def test_papers_ledger_and_docs_open_without_torch() -> None:
    code = (
        "import sys; from millstream.reproduce import papers, ledger, docs, commands; docs.page(); "
        "commands.papers_command(json=True); print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.split() == ["False"]
    assert done.stdout.count("\n") == 1
    rows = json.loads(done.stdout)["papers"]
    assert len(rows) == 79
    assert set(rows[0]) == {"number", "name", "title", "room", "switch", "state", "measured"}


def test_the_page_of_techniques_is_current() -> None:
    path = ledger.SOURCE_ROOT.parent / docs.PAGE
    if not path.is_file():
        pytest.skip("not a source tree: docs/techniques.md is not here")
    assert path.read_text(encoding="utf-8") == docs.page(), "run: python -m millstream.reproduce.docs --write"


def test_the_page_shows_states_claims_and_measurements(tree: Path, record: ledger.Record) -> None:
    ledger.write(record, tree / "records" / "pagedattention.json")
    text = docs.page(tree / "records", tree)
    row = next(line for line in text.splitlines() if line.startswith("| 11 |"))
    assert "| works |" in row
    assert "speed: paper 2 to 4×, here 3×" in row
    assert record.date[:10] in row
    assert "| twice as fast | 3× | passed |" in text
    (tree / "technique.py").write_text("SPEED = 3\n")
    row = next(line for line in docs.page(tree / "records", tree).splitlines() if line.startswith("| 11 |"))
    assert "| stale |" in row
    assert "| works |" not in row


def test_docs_check_tells_a_page_that_is_not_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "docs" / "techniques.md"
    assert docs.main(["--check", "--path", str(path)]) == 1
    assert docs.main(["--write", "--path", str(path)]) == 0
    assert docs.main(["--check", "--path", str(path)]) == 0
    path.write_text(path.read_text().replace("PagedAttention", "PagedAtention"))
    assert docs.main(["--check", "--path", str(path)]) == 1
    assert "is not current" in capsys.readouterr().err


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        commands.reproduce_command("pagedatention")
    assert caught.value.nearest == "pagedattention"


def test_a_paper_without_an_experiment_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "names", lambda point: ["fastgen"])
    assert commands.reproduce_command("loquetier", json=True) == 2
    out, err = capsys.readouterr()
    assert "'not yet'" in err
    assert "fastgen" in err
    assert json.loads(out)["state"] == "not yet"


@pytest.fixture
def plugged(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The synthetic experiment in the place of `pagedattention`, in a source tree of its own."""
    source = tree / "src"
    source.mkdir()
    (tree / "pyproject.toml").write_text("")
    module = types.SimpleNamespace(PLUGIN=lambda: Synthetic(source), CARD=Card("pagedattention", "", paper=11))
    monkeypatch.setattr(registry, "names", lambda point: ["pagedattention"])
    monkeypatch.setattr(registry, "module", lambda point, name: module)
    monkeypatch.setattr(ledger, "SOURCE_ROOT", source)
    monkeypatch.setattr(ledger, "RECORDS", source / "records")
    return tree


def test_reproduce_prints_one_line_of_json_and_writes_the_record(
    plugged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.reproduce_command("11", json=True, record=True) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == json.loads((plugged / "src" / "records" / "pagedattention.json").read_text())
    assert json.loads(out)["name"] == "pagedattention"


def test_reproduce_shows_what_a_person_wants_to_know(plugged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.reproduce_command("pagedattention", out=plugged / "mine.json") == 0
    out = capsys.readouterr().out
    for part in ("Fast against slow", "same tokens", "twice as fast: 3", "paper 2 to 4×, here 3×", "verdict: works"):
        assert part in out
    assert ledger.read(plugged / "mine.json").verdict == "works"


def test_a_result_that_nobody_asked_to_write_is_kept_all_the_same(
    plugged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILLSTREAM_HOME", str(plugged / "home"))
    assert commands.reproduce_command("pagedattention", json=True) == 0
    assert commands.reproduce_command("pagedattention", quick=True, json=True) == 0
    kept = plugged / "home" / "records"
    assert str(kept / "pagedattention.json") in capsys.readouterr().err
    assert not ledger.read(kept / "pagedattention.json").quick and ledger.read(kept / "pagedattention-quick.json").quick


def test_a_quick_record_does_not_replace_a_full_one(plugged: Path) -> None:
    assert commands.reproduce_command("pagedattention", record=True, json=True) == 0
    with pytest.raises(ConfigError, match="would replace the full record"):
        commands.reproduce_command("pagedattention", quick=True, record=True)
    with pytest.raises(ConfigError, match="choose one"):
        commands.reproduce_command("pagedattention", record=True, out=plugged / "x.json")


def test_a_failed_run_has_exit_status_one(plugged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(PLUGIN=lambda: Synthetic(plugged / "src", times=lambda arm, repeat: 1.0))
    monkeypatch.setattr(registry, "module", lambda point, name: module)
    assert commands.reproduce_command("pagedattention", json=True, out=plugged / "mine.json") == 1


def test_built_experiments_are_sound() -> None:
    from millstream.reproduce.protocol import audit

    for name, experiment in docs.experiments().items():
        audit(experiment)
        assert ledger.hash_files(experiment.files()), name
        assert experiment.paper is None or papers.find(name).number == experiment.paper
