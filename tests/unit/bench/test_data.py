"""Public data is found, converted, or asked for in a clear way."""

from __future__ import annotations

import gzip
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.core.errors import BadFile, DownloadError, UnknownName
from millstream.sim import data

CSV = "num_prefill_tokens,num_decode_tokens\n1,2\n3,4\n5,6\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MILLSTREAM_DATA, and an empty home beside it."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MILLSTREAM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MILLSTREAM_HOME", str(tmp_path / "home"))
    return tmp_path


def put(root: Path, name: str, content: bytes) -> Path:
    path = root / data.SETS[name].path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def source() -> Iterator[str]:
    """A server on loopback that has the lengths, and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.endswith("lengths.csv")
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(CSV.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def from_here(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    class Here(data.DataSet):
        @property
        def url(self) -> str:
            return url

    entry = data.SETS["sharegpt-lengths"]
    fields = {name: getattr(entry, name) for name in entry.__slots__}
    monkeypatch.setitem(data.SETS, "sharegpt-lengths", Here(**fields))


def test_a_file_in_the_data_folder_is_used_as_it_is(folder: Path) -> None:
    path = put(folder / "data", "sharegpt-lengths", gzip.compress(CSV.encode()))
    assert data.find("sharegpt-lengths") == path
    assert data.lengths("sharegpt-lengths") == [(1, 2), (3, 4), (5, 6)]


def test_a_download_keeps_every_second_row_and_is_made_once(
    folder: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_here(monkeypatch, f"{source}/lengths.csv")
    assert data.lengths("sharegpt-lengths") == [(1, 2), (5, 6)]
    from_here(monkeypatch, "http://127.0.0.1:9/gone")
    assert data.lengths("sharegpt-lengths") == [(1, 2), (5, 6)]


def test_what_cannot_be_downloaded_says_where_to_put_it(
    folder: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_here(monkeypatch, f"{source}/missing")
    with pytest.raises(DownloadError, match=r"MILLSTREAM_DATA.*sharegpt_8k|sharegpt_8k.*MILLSTREAM_DATA"):
        data.find("sharegpt-lengths")
    with pytest.raises(DownloadError, match="is not here"):
        data.find("sharegpt-lengths", download=False)


def test_an_unknown_set_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="nearest is 'sharegpt-lengths'"):
        data.find("sharegpt-length")


def test_a_damaged_row_is_named_by_its_line(folder: Path) -> None:
    put(folder / "data", "sharegpt-lengths", gzip.compress(CSV.replace("3,4", "3,x").encode()))
    with pytest.raises(BadFile, match="line 3"):
        data.lengths("sharegpt-lengths")


def test_a_file_that_is_no_gzip_is_refused(folder: Path) -> None:
    put(folder / "data", "wikitext2-test", b"plain")
    with pytest.raises(BadFile, match="damaged"):
        data.text("wikitext2-test")


def test_every_set_names_a_commit_and_a_licence() -> None:
    for name, entry in data.SETS.items():
        assert len(entry.commit) == 12 and entry.licence, name
