"""Corpora are deterministic, their parts are disjoint by file, and a mistake in a user's data is named with its place."""

import json
import sysconfig
from pathlib import Path

import pytest

from mull.data.corpus import Corpus, Document, load_stdlib, load_text_files, subsample


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_stdlib()


def test_the_standard_library_is_split_by_file(stdlib: Corpus) -> None:
    train, held_out = ([document.name for document in part] for part in stdlib)
    assert not set(train) & set(held_out)
    assert train == sorted(train, key=Path)
    assert held_out == sorted(held_out, key=Path)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.10
    assert load_stdlib() == stdlib


def test_the_standard_library_holds_sources_and_nothing_else(stdlib: Corpus) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = stdlib.train + stdlib.held_out
    names = {document.name for document in documents}
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3"}
    for document in documents[::17]:
        source = (root / document.name).read_bytes()
        assert document.text.encode() == source
        assert 500 <= len(source) <= 200_000


def test_the_split_does_not_move(stdlib: Corpus) -> None:
    # Written down from one run: a change of the rule would let one version train on what another held out.
    held_out = {document.name for document in stdlib.held_out}
    assert {"asyncio/locks.py", "email/_policybase.py", "modulefinder.py", "operator.py", "runpy.py"} <= held_out


def test_a_subsample_is_seeded_and_bounded(stdlib: Corpus) -> None:
    sample = subsample(stdlib.train, 200_000, seed=1)
    size = sum(len(document.text.encode()) for document in sample)
    assert 150_000 < size <= 200_000
    assert sample == subsample(stdlib.train, 200_000, seed=1)
    assert sample != subsample(stdlib.train, 200_000, seed=2)
    order = [stdlib.train.index(document) for document in sample]
    assert order == sorted(set(order)), "without replacement, in the order of the corpus"
    with pytest.raises(ValueError, match="max_bytes=10"):
        subsample(stdlib.train, 10)


def test_files_folders_and_lines_of_json_become_documents(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"two\r\n")
    (folder / "inner" / "c.py").write_text("three = 3\n")
    (folder / "blank.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        json.dumps({"text": "four\u2028\n4", "id": 4}, ensure_ascii=False) + '\n\n{"text": "five"}\n', "utf-8"
    )
    assert load_text_files([lines, str(folder)]) == [
        Document(f"{lines}:1", "four\u2028\n4"),
        Document(f"{lines}:3", "five"),
        Document(str(folder / "b.txt"), "two\r\n"),
        Document(str(folder / "inner" / "c.py"), "three = 3\n"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', "line 2 has the keys content"),
        ("{}", r"line 2 has the keys \(none\)"),
        ('{"text": 3}', "line 2 has the keys text"),
        ("[1]", "line 2 has a list"),
        ("{text: x}", "line 2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_text_files([file])


def test_missing_unreadable_and_empty_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        load_text_files([tmp_path / "nowhere.txt"])
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not valid UTF-8"):
        load_text_files([latin])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no text in .*empty"):
        load_text_files([empty])
    with pytest.raises(ValueError, match="an empty list of paths"):
        load_text_files([])
