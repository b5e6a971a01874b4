import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import config, save_dataset, write_jsonl

from qlatrain.data import text_files
from qlatrain.data.huggingface import IndexedDataset
from qlatrain.data.sources import StdlibSource, TextField, open_source
from qlatrain.data.text_files import TextSource

TEXT = TextField("text")


def all_of(source) -> list[str]:
    return [source[i] for i in range(len(source))]


def read_all(reader) -> list[str]:
    return list(iter(reader.read, None))


def test_stdlib_is_the_library_without_its_tests():
    source = open_source(config(source="stdlib"))
    names = [name for name, _ in source.files]
    assert names == sorted(names) and {"json/decoder.py", "os.py", "unittest/case.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "site-packages", "idlelib", "__pycache__"} & set(n.split("/"))]
    assert source[names.index("json/decoder.py")] == (source.folder / "json/decoder.py").read_bytes().decode()


def test_stdlib_leaves_out_what_cannot_be_read(tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    (tmp_path / "b.py").write_text("b = 1")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text("c = 1")
    assert all_of(StdlibSource(tmp_path)) == ["b = 1", ""]
    with pytest.raises(ValueError, match=r"found no \.py files"):
        StdlibSource(tmp_path / "none")


def test_text_reads_every_ending_in_order(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "z.txt").write_bytes("zéd\r\nlines".encode())
    (tmp_path / "deep" / "er" / "a.txt").write_text("a")
    (tmp_path / "deep" / "empty.txt").write_text("")
    rows = write_jsonl(tmp_path / "rows.jsonl", ["one", "two\nlines", "tre"], "body")
    pq.write_table(pa.table({"body": ["p0", None, "p2"], "n": [1, 2, 3]}), tmp_path / "t.parquet")
    files = [str(tmp_path / "t.parquet"), rows, str(tmp_path / "**" / "*.txt"), str(tmp_path / "deep" / "z.txt")]
    source = TextSource(files, TextField("body"))
    assert all_of(source) == ["p0", "", "p2", "one", "two\nlines", "tre", "a", "zéd\r\nlines"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "[1].txt").write_text("brackets in a name")
    assert all_of(TextSource(["~/[1].txt"], TEXT)) == all_of(TextSource(["~/*.txt"], TEXT)) == ["brackets in a name"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_jsonl_lines_are_found_whatever_the_chunks(tmp_path, monkeypatch, ending, last):
    monkeypatch.setattr(text_files, "SCAN_BYTES", 7)
    texts = ["a", "", "bb" * 20, "ü" * 9]
    content = (ending * 2).join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "c.jsonl").write_bytes((content + ending * last).encode())
    assert [text for text in all_of(TextSource([str(tmp_path / "c.jsonl")], TEXT)) if text] == [t for t in texts if t]


def test_jsonl_is_not_held_in_memory(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["x" * 10_000] * 2_000)  # 20 MB
    tracemalloc.start()
    source = TextSource([path], TEXT)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 2_000 and held < 1_000_000


def bad_files(tmp_path, name: str, content: bytes | None) -> list[str]:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    return [str(tmp_path / name)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("*.jsonl", None, "matches no file"),
        ("a.csv", b"a", r"ends in none of \.txt, \.jsonl, \.parquet"),
        ("", None, "is a folder"),
        ("a.txt", b"", "every file is empty"),
        ("a.jsonl", b"\n\n", "every file is empty"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"body": "b", "id": 1}\n', r"a\.jsonl:3 has no field 'text'.*\['body', 'id'\]"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "b\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n[1]\n', r"a\.jsonl:2 is a JSON list"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' holds int"),
        ("a.txt", b"ab\xff", r"a\.txt is not UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not UTF-8 at byte 10"),
        ("a.parquet", b"nonsense", "is not a parquet file"),
    ],
)
def test_bad_text_files(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        all_of(TextSource(bad_files(tmp_path, name, content), TEXT))


def test_bad_parquet_fields(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "number": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"has no field 'text', its fields are \['body', 'number'\]"):
        TextSource([str(tmp_path / "t.parquet")], TEXT)
    with pytest.raises(ValueError, match="row 0: field 'number' holds int"):
        all_of(TextSource([str(tmp_path / "t.parquet")], TextField("number")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "data.source='web' is not known"),
        ({"source": "text", "files": []}, "needs data.files"),
        ({"source": "text", "streaming": True, "files": ["a"]}, "data.streaming=true works only"),
        ({"source": "hf"}, "needs data.dataset"),
        ({"source": "hf", "dataset": "./nowhere/at/all"}, "'./nowhere/at/all'.*could not be opened"),
    ],
)
def test_bad_source_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        open_source(config(**changes))


@pytest.mark.parametrize("saved", [True, False])
def test_hf_by_index_and_streamed_agree(tmp_path, saved):
    texts = [f"text {i}" for i in range(25)]
    if saved:
        folder = save_dataset(tmp_path / "ds", texts)
    else:
        (tmp_path / "ds").mkdir()
        write_jsonl(tmp_path / "ds" / "a.jsonl", texts[:10])
        write_jsonl(tmp_path / "ds" / "b.jsonl", texts[10:])
        folder = str(tmp_path / "ds")
    assert all_of(open_source(config(source="hf", dataset=folder))) == texts
    stream = open_source(config(source="hf", dataset=folder, streaming=True))
    assert read_all(stream.open()) == texts
    reader, other = stream.open(), stream.open()
    for done in range(len(texts)):
        state = json.loads(json.dumps(reader.state()))
        resumed = stream.open(state)
        assert resumed.state() == state
        assert read_all(resumed) == texts[done:]
        assert reader.read() == texts[done]
    assert other.read() == texts[0], "readers share no position"


def test_bad_hf_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    folder = save_dataset(tmp_path / "ds", ["a"])
    with pytest.raises(ValueError, match=r"has no field 'body', its fields are \['other', 'text'\]"):
        open_source(config(source="hf", dataset=folder, text_key="body"))
    with pytest.raises(ValueError, match="field 'other' holds int"):
        all_of(open_source(config(source="hf", dataset=folder, text_key="other")))
    DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(tmp_path / "dd"))
    with pytest.raises(ValueError, match=r"has no split 'train'; set data.split to one of \['test'\]"):
        open_source(config(source="hf", dataset=str(tmp_path / "dd")))
    with pytest.raises(ValueError, match="holds no documents"):
        IndexedDataset(Dataset.from_dict({"text": []}), TEXT, "d", {"split": "train"})


def test_streams_can_be_opened_while_other_threads_open_file_systems(tmp_path):
    import threading

    from huggingface_hub import HfFileSystem

    stream = open_source(config(source="hf", dataset=save_dataset(tmp_path / "ds", ["a", "b"]), streaming=True))
    done = threading.Event()

    def disturb():
        while not done.is_set():
            for i in range(50):
                HfFileSystem._cache[f"test {i}"] = i
            for i in range(50):
                del HfFileSystem._cache[f"test {i}"]

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(100):
            assert read_all(stream.open()) == ["a", "b"]
    finally:
        done.set()
        thread.join()
