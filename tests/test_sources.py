"""Raw records by index: what is read is what was written, and errors name the line."""

import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.parquet
import pytest
import tiny_bucket

from luthier.data import sources
from luthier.errors import LuthierError

RECORDS = [{"prompt": f"p{i} é🙂 \u2028", "completion": "x" * (i % 5) + "\n"} for i in range(57)]


def jsonl(records, end="\n"):
    return end.join(json.dumps(r, ensure_ascii=False) for r in records)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "name,content,lines",
    [
        ("a.jsonl", jsonl(RECORDS) + "\n", range(1, 58)),
        ("a.jsonl", jsonl(RECORDS), range(1, 58)),
        ("a.jsonl", "\n \n" + jsonl(RECORDS, "\r\n\r\n"), range(3, 117, 2)),
        ("a.jsonl", b"\xef\xbb\xbf" + jsonl(RECORDS).encode(), range(1, 58)),
        ("a.ndjson", jsonl(RECORDS), range(1, 58)),
        ("a.json", json.dumps(RECORDS), [1] * 57),
        ("a.json", json.dumps(RECORDS, indent=2, ensure_ascii=False), range(2, 57 * 4, 4)),
        ("a.json", "[]" if False else json.dumps(RECORDS, separators=(",\n", ":")), range(1, 114, 2)),
        ("a.json", jsonl(RECORDS), range(1, 58)),
    ],
)
def test_json_comes_back_with_its_lines(tmp_path, name, content, lines):
    path = written(tmp_path / name, content)
    source = sources.open_source(path)
    assert [source[i] for i in range(len(source))] == RECORDS
    assert [source.where(i) for i in range(len(source))] == [f"{path}:{line}" for line in lines]


def test_blocks_may_end_anywhere(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jsonl", jsonl(RECORDS))
    for block in (1, 7, 64):
        monkeypatch.setattr(sources, "_BLOCK", block)
        source = sources.JsonRecords(path)
        assert [source[i] for i in range(len(source))] == RECORDS


def test_parquet_comes_back_without_the_nulls_it_adds(tmp_path):
    records = [
        {"messages": [{"role": "user", "content": str(i)} | ({"name": "n"} if i == 3 else {})]} for i in range(25)
    ]
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    source = sources.open_source(path)
    assert [source[i] for i in (*range(25), 0, 24, 8)] == [records[i] for i in (*range(25), 0, 24, 8)]
    assert source.where(24) == f"{path}: row 25"
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, list(range(25)) * 8)) == records * 8


def test_a_glob_is_its_files_in_order_and_limit_the_first_of_them(tmp_path):
    for part in (2, 0, 1):
        written(tmp_path / f"part-{part}.jsonl", jsonl(RECORDS[part * 19 : part * 19 + 19]))
    written(tmp_path / "other.txt", "no")
    source = sources.open_source(f"{tmp_path}/part-*.jsonl")
    assert [source[i] for i in range(57)] == RECORDS
    assert source.where(19) == f"{tmp_path}/part-1.jsonl:1"
    assert sources.local_copy(f"{tmp_path}/part-1.jsonl", tmp_path) == f"{tmp_path}/part-1.jsonl"  # no copy
    limited = sources.open_source(f"{tmp_path}/part-*.jsonl", limit=20)
    assert len(limited) == 20 and limited[19] == RECORDS[19] and limited.where(19) == source.where(19)


def test_fingerprint_is_of_the_content(tmp_path):
    a = sources.open_source(written(tmp_path / "a.jsonl", jsonl(RECORDS)))
    b = sources.open_source(written(tmp_path / "b.jsonl", jsonl(RECORDS)))
    c = sources.open_source(written(tmp_path / "c.jsonl", jsonl(RECORDS[:-1] + [{"prompt": "other"}])))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert sources.open_source(str(tmp_path / "a.jsonl"), limit=9).fingerprint != a.fingerprint


def test_threads_read_at_once(tmp_path):
    source = sources.open_source(written(tmp_path / "a.jsonl", jsonl(RECORDS)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, list(range(57)) * 50)) == RECORDS * 50


def test_a_bucket_file_is_copied_once_for_each_version(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    written(disk / "a.jsonl", jsonl(RECORDS))
    with tiny_bucket.bucket(disk):
        source = sources.open_source("gs://bucket/a.jsonl", cache_dir=tmp_path / "cache")
        assert [source[i] for i in range(57)] == RECORDS
        assert source.where(3) == "gs://bucket/a.jsonl:4"
        sources.open_source("gs://bucket/a.jsonl", cache_dir=tmp_path / "cache")
        assert len(list((tmp_path / "cache" / "files").iterdir())) == 1
        written(disk / "a.jsonl", jsonl(RECORDS[:9]))
        assert len(sources.open_source("gs://bucket/a.jsonl", cache_dir=tmp_path / "cache")) == 9


BAD = [
    (
        "a.jsonl",
        jsonl(RECORDS[:16]) + '\n{"prompt": "x", "completion"}\n' + jsonl(RECORDS),
        16,
        r"a\.jsonl:17: broken JSON at column 29: .*\. Mend",
    ),
    ("a.jsonl", jsonl(RECORDS[:16]) + "\n[1, 2]\n", 16, r"a\.jsonl:17: expected an object, got '\[1, 2\]'"),
    ("a.jsonl", jsonl(RECORDS[:2]).encode() + b'\n{"a": "\xff"}', 2, r"a\.jsonl:3: not UTF-8"),
    ("a.json", json.dumps(RECORDS[:16], indent=0)[:-2] + ',\n{"prompt" "x"}]', None, r"a\.json:66: broken JSON"),
    (
        "a.json",
        json.dumps(RECORDS[:2], indent=0)[:-1],
        None,
        r"a\.json:\d+: broken JSON: expected ',' or '\]' after a record",
    ),
    ("a.jsonl", "\n\n", None, r"a\.jsonl: there are no records in it"),
    ("a.json", "[]", None, r"a\.json: there are no records in it"),
    ("a.csv", "x,y", None, r"a\.csv: unknown kind of file\. Give one of \.jsonl"),
    ("a.parquet", "PAR1 no", None, r"a\.parquet: not a readable Parquet file"),
]


@pytest.mark.parametrize("name,content,index,message", BAD)
def test_bad_input_is_one_clear_line(tmp_path, name, content, index, message):
    path = written(tmp_path / name, content)
    with pytest.raises(LuthierError, match=message) as error:
        sources.open_source(path)[index]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path,message",
    [
        ("gone.jsonl", r"gone\.jsonl: no such file\. .* has here\.jsonl"),
        ("*.parquet", r"\*\.parquet: no file matches"),
        ("", r": this is a directory\. Name its files"),
    ],
)
def test_missing_files(tmp_path, path, message):
    written(tmp_path / "here.jsonl", jsonl(RECORDS))
    with pytest.raises(LuthierError, match=message):
        sources.open_source(f"{tmp_path}/{path}")
