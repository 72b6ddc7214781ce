"""Equal data under different names is read equally, nothing is read silently wrong, and a mistake is named with its place."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mull.data.sources import Document, load_documents, read_records

pytest_plugins = ["s3_server"]

ROWS = {"text": ["one", "two", "three"], "number": [1, 2, 3]}


def upload(path: Path, url: str) -> None:
    import s3fs

    s3fs.S3FileSystem(use_listings_cache=False).put(str(path), url, recursive=True)


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with its cache in a folder of the test."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    return library


def write_folder(folder: Path) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner-2").mkdir()
    (folder / "b.txt").write_bytes(b"two\r\n")
    (folder / "inner" / "c.py").write_text("three = 3\n")
    (folder / "inner-2" / "d.md").write_text("# four\n")
    (folder / "blank.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}\n\n{"text": "six"}\n'))


def in_folder(root: str) -> list[Document]:
    return [
        Document(f"{root}/b.txt", "two\r\n"),
        Document(f"{root}/inner/c.py", "three = 3\n"),
        Document(f"{root}/inner-2/d.md", "# four\n"),
        Document(f"{root}/packed.jsonl.gz:1", "five"),
        Document(f"{root}/packed.jsonl.gz:3", "six"),
    ]


def test_a_folder_is_the_same_by_path_by_url_and_in_s3(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    write_folder(folder)
    upload(folder, f"{bucket}/folder")
    monkeypatch.chdir(tmp_path)
    for root in (str(folder), "folder", f"file://{folder}", f"{bucket}/folder"):
        assert load_documents([root]) == in_folder(root)
        assert load_documents([root + "/"]) == in_folder(root)
    assert load_documents([folder]) == in_folder(str(folder))
    assert load_documents([f"{bucket}/folder/b.txt"]) == [in_folder(f"{bucket}/folder")[0]]


def test_lines_of_json_become_documents_in_the_order_given(tmp_path: Path) -> None:
    lines, text = tmp_path / "lines.jsonl", tmp_path / "text"
    lines.write_text(
        json.dumps({"text": "four\u2028\n4", "id": 4}, ensure_ascii=False) + '\n\n{"text": "five"}\n', "utf-8"
    )
    text.write_text("six")
    assert load_documents([text, str(lines)]) == [
        Document(str(text), "six"),
        Document(f"{lines}:1", "four\u2028\n4"),
        Document(f"{lines}:3", "five"),
    ]


def test_the_key_of_the_text_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('[{"text": "a", "content": "b"}, {"content": "c"}]')
    assert load_documents([file], key="content") == [Document(f"{file}:1", "b"), Document(f"{file}:2", "c")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', "jsonl:2 has the keys content"),
        ("{}", r"jsonl:2 has the keys \(none\)"),
        ('{"text": 3}', "jsonl:2 has int under 'text'"),
        ("[1]", "jsonl:2 has a list"),
        ("{text: x}", "jsonl:2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_documents([file])


def test_missing_unreadable_and_empty_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        load_documents([tmp_path / "nowhere.txt"])
    latin, cut, folder = tmp_path / "latin.txt", tmp_path / "cut.txt.gz", tmp_path / "empty"
    latin.write_bytes("é".encode("latin-1"))
    cut.write_bytes(gzip.compress(b"text" * 99)[:-9])
    folder.mkdir()
    with pytest.raises(ValueError, match=r"latin\.txt is not valid UTF-8"):
        load_documents([latin])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz is not a complete gzip file"):
        load_documents([cut])
    with pytest.raises(ValueError, match=r"no text in .*empty"):
        load_documents([folder])
    with pytest.raises(ValueError, match="an empty list of paths"):
        load_documents([])
    with pytest.raises(ValueError, match=r"no \.jsonl files in .*empty"):
        list(read_records(folder))
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match=r"object\.json has a dict: a \.json file must be a list"):
        list(read_records(tmp_path / "object.json"))
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ValueError, match=r"text\.txt has no records"):
        list(read_records(tmp_path / "text.txt"))


def test_data_that_is_missing_in_s3_is_named(bucket: str) -> None:
    for url in (f"{bucket}/nowhere.txt", "s3://no-such-bucket/a.txt"):
        with pytest.raises(FileNotFoundError, match=f"{url} does not exist"):
            load_documents([url])


def texts(source: str, **options: Any) -> list[str]:
    return [document.text for document in load_documents([source], **options)]


WRITERS: dict[str, Callable[[Any, str], Any]] = {
    "saved": lambda dataset, path: dataset.save_to_disk(path),
    "table.parquet": lambda dataset, path: dataset.to_parquet(path),
    "table.csv": lambda dataset, path: dataset.to_csv(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_dataset_is_read_from_disk_and_from_s3(
    name: str, tmp_path: Path, bucket: str, datasets: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    WRITERS[name](datasets.Dataset.from_dict(ROWS), str(path))
    upload(path, f"{bucket}/{name}")
    capfd.readouterr()
    for source in (f"hf:{path}", f"hf:{bucket}/{name}"):
        assert load_documents([source]) == [Document(f"{source}:{i}", text) for i, text in enumerate(ROWS["text"])]
        assert [record.fields for record in read_records(source, columns=["number", "absent"])] == [
            {"number": number} for number in ROWS["number"]
        ]
    assert capfd.readouterr() == ("", ""), "progress bars"


def test_the_user_decides_about_progress_bars(tmp_path: Path, datasets: Any) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(str(tmp_path / "saved"))
    try:
        for set_, disabled in ((datasets.disable_progress_bars, True), (datasets.enable_progress_bars, False)):
            set_()
            texts(f"hf:{tmp_path / 'saved'}")
            assert datasets.are_progress_bars_disabled() == disabled
    finally:
        datasets.enable_progress_bars()


@pytest.mark.parametrize("layout", ["saved", "loaded"])
def test_a_split_is_chosen_by_name_and_never_by_chance(layout: str, tmp_path: Path, datasets: Any) -> None:
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(2)]}) for name in ("train", "test")
    }
    if layout == "saved":
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        for name, part in parts.items():
            part.to_parquet(str(tmp_path / "data" / f"{name}-00000-of-00001.parquet"))
    source = f"hf:{tmp_path / 'data'}"
    assert texts(source, split="test") == ["test 0", "test 1"]
    assert texts(source, split="all") == ["train 0", "train 1", "test 0", "test 1"]
    with pytest.raises(ValueError, match="cannot be read: it has the splits train, test: choose one"):
        texts(source)
    with pytest.raises(ValueError, match="cannot be read: .*nope"):
        texts(source, split="nope")
    with pytest.raises(ValueError, match="cannot be read: .*config"):
        texts(source, split="test", config="config")


def test_split_and_config_are_refused_where_they_would_do_nothing(tmp_path: Path, datasets: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}')
    for option in ("split", "config"):
        with pytest.raises(ValueError, match=rf"{option}='train' is for datasets, but .*a\.jsonl"):
            load_documents([file], **{option: "train"})
        with pytest.raises(ValueError, match=rf"{option}='train' is for datasets, but .*a\.jsonl"):
            list(read_records(file, **{option: "train"}))
    datasets.Dataset.from_dict(ROWS).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="one dataset without splits"):
        texts(f"hf:{tmp_path / 'saved'}", split="train")
    assert texts(f"hf:{tmp_path / 'saved'}", split="all") == ROWS["text"]


def test_bad_datasets_are_named(tmp_path: Path, datasets: Any, bucket: str) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"saved:0 has int under 'number'"):
        texts(f"hf:{tmp_path / 'saved'}", key="number")
    with pytest.raises(ValueError, match=r"saved:0 has the keys text, number: .* under 'body'"):
        texts(f"hf:{tmp_path / 'saved'}", key="body")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read: Parquet"):
        texts(f"hf:{tmp_path / 'bad.parquet'}")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet cannot be read"):
        texts(f"hf:{tmp_path / 'nowhere.parquet'}")
    for name in ("nowhere", "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match=rf"hf:{bucket}/{name} cannot be read.*save_to_disk"):
            texts(f"hf:{bucket}/{name}")


def test_an_unreachable_hub_is_one_sentence(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match="hf:owner/name is no local path, and the Hugging Face Hub cannot be reached"
    ) as caught:
        texts("hf:owner/name")
    assert "\n" not in str(caught.value)


def test_an_unreachable_s3_is_one_sentence(bucket: str, monkeypatch: pytest.MonkeyPatch, datasets: Any) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for source in (f"{bucket}/a.txt", f"hf:{bucket}/saved"):
            with pytest.raises(OSError, match=f"{bucket}/.* could not be reached: Could not connect") as caught:
                load_documents([source])
            assert caught.type is OSError
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_connection_to_s3_that_is_lost_while_reading_is_one_sentence(
    bucket: str, monkeypatch: pytest.MonkeyPatch, datasets: Any
) -> None:
    from botocore.exceptions import EndpointConnectionError

    def lose(path: str) -> None:
        raise EndpointConnectionError(endpoint_url=path)

    datasets.Dataset.from_dict(ROWS).save_to_disk(f"{bucket}/saved")
    monkeypatch.setattr(datasets, "load_from_disk", lose)
    with pytest.raises(OSError, match=f"hf:{bucket}/saved cannot be read: {bucket}/saved could not be reached"):
        texts(f"hf:{bucket}/saved")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"hf:owner/name needs the datasets library: pip install 'mull\[data\]'"):
        texts("hf:owner/name")


def test_files_are_read_as_people_have_them(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    folder = tmp_path / "folder"
    (folder / ".venv").mkdir(parents=True)
    (folder / "a.TXT").write_bytes(mark + b"one")
    (folder / "b.JSONL").write_bytes(mark + b'{"text": "two"}\r\n{"text": "three"}\r\n')
    (folder / "c.ndjson").write_bytes(b'{"text": "four"}\n')
    (folder / "d.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "five"}\n'))
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (folder / ".venv" / "module.py").write_text("hidden = 1\n")
    assert [document.text for document in load_documents([folder])] == ["one", "two", "three", "four", "five"]
    assert [record.fields["text"] for record in read_records(folder)] == ["two", "three", "four", "five"]
    assert [document.text for document in load_documents([folder / ".venv"])] == ["hidden = 1\n"], "asked for by name"
    lines, listed = tmp_path / "lines.json", tmp_path / "list.json"
    lines.write_bytes(mark + b'{"text": "six"}\n{"text": "seven"}\n')
    listed.write_bytes(mark + b'[{"text": "eight"}]')
    assert load_documents([lines, listed]) == [
        Document(f"{lines}:1", "six"),
        Document(f"{lines}:2", "seven"),
        Document(f"{listed}:1", "eight"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', r"a\.jsonl:2 has half of a surrogate pair"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"n": ' + b"9" * 5000 + b"}\n",
            r"a\.jsonl:2 has a number of more than 4,300 digits",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"n": ' + b"[" * 200_000 + b"}\n", r"a\.jsonl:2 is (nested too deeply|not JSON)"),
        ("a.json", b'[{"text": "x"},\n{"text": y}]', r"a\.json:2 is not JSON"),
        ("a.json", b'{"text": "x"}', r"a\.json has a dict: a \.json file must be a list of objects, or have one"),
        ("a.json", b'{"text": "x"}\n{"text": 3}\n', r"a\.json:2 has int under 'text'"),
        ("a.txt", b"good\ncaf\xe9\n", r"a\.txt is not valid UTF-8 in line 2"),
        # Without mtime=0 the bytes, and with them the names of these tests, change each second; xdist compares names.
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-1] + b"?", r"a\.txt\.gz is not a complete gzip file"),
        (
            "a.txt.gz",
            gzip.compress(bytes(range(256)) * 9, mtime=0)[:12] + b"\xff" * 40,
            r"a\.txt\.gz is not a complete gzip file",
        ),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz is not a complete gzip file"),
    ],
)
def test_damage_is_named_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents([tmp_path / name])


def test_a_path_means_the_same_with_any_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a b", "[a]", "a?b", "a*", "50%", "a%20b", "a#b", "~a", "a&b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "t.txt").write_text(name)
        for written in (f"{folder}", f"file://{folder}", f"~/{name}", f"~/{name}/t.txt"):
            assert [document.text for document in load_documents([written])] == [name], written


def test_a_dataset_may_lie_in_a_folder_of_any_name(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = datasets.Dataset.from_dict(ROWS)
    for name in ("a b", "[a]", "a?b", "50%", "a#b"):
        rows.to_parquet(str(tmp_path / name / "T.PARQUET"))
        rows.save_to_disk(str(tmp_path / name / "saved"))
        for written in (f"{tmp_path}/{name}/T.PARQUET", f"~/{name}/T.PARQUET", f"file://{tmp_path}/{name}/saved"):
            assert [document.text for document in load_documents([f"hf:{written}"])] == ROWS["text"], written
