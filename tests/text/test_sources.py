import csv
import gzip
import json
import os
import re
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mlx_slm.errors import SlmError
from mlx_slm.text.readers import BOMB_BYTES, BOMB_RATIO, LONG_TEXT, Reading, read_file
from mlx_slm.text.sources import Source

TEXTS = ["one line", 'two\nlines, "quoted"\ttab', "  äöü \u2028 ¶ 漢字 🙂\r\n", "a,b;c" * 50]


def read(source, **options):
    reading = Reading(**options)
    return list(Source.parse(str(source)).documents(reading)), reading


def jsonl_bytes(texts=TEXTS):
    return "".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) + "\n" for t in texts).encode()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv.gz", "a.csv.zst", "a.parquet"]
)
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = tmp_path / name
    if "parquet" in name:
        pyarrow.parquet.write_table(pyarrow.table({"n": [1] * len(TEXTS), "text": TEXTS}), path)
    else:
        raw = jsonl_bytes()
        if "jsonl" not in name:
            with open(tmp_path / "plain", "w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file, delimiter="\t" if "tsv" in name else ",")
                rows.writerows([["n", "text"], *([1, text] for text in TEXTS)])
            raw = (tmp_path / "plain").read_bytes()
        if name.endswith(".gz"):
            raw = gzip.compress(raw)
        if name.endswith(".zst"):  # two frames, as parallel compressors write
            compress = zstandard.ZstdCompressor().compress
            raw = compress(raw[:40]) + compress(raw[40:])
        path.write_bytes(raw)
    assert read(path)[0] == TEXTS


def test_text_files_are_documents_and_long_ones_are_cut_without_loss(tmp_path):
    (tmp_path / "a.md").write_text("# note\n\nshort\n")
    long = "".join(f"Paragraph {i}, some words.\nmore of it\n\n" for i in range(8000))
    (tmp_path / "b.txt").write_text(long)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"x" * (LONG_TEXT + 7)))
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    found, _ = read(tmp_path)
    assert found[0] == "# note\n\nshort\n" and found[-1] == "x" * (LONG_TEXT + 7)
    parts = found[1:-1]
    assert "".join(parts) == long and len(parts) > 10
    assert all(part.endswith("\n\n") and 20_000 <= len(part) <= 21_000 for part in parts[:-1])


def test_a_long_file_with_a_byte_order_mark_is_read_to_its_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"line of text\n" * 50_000)
    assert "".join(read(tmp_path / "a.txt")[0]) == "line of text\n" * 50_000


def test_damaged_parquet_pages_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"document {i}" for i in range(500)]}), path)
    raw = bytearray(path.read_bytes())
    raw[40:400] = bytes(360)
    path.write_bytes(raw)
    with pytest.raises(SlmError, match=r"a\.parquet"):
        read(path)


def test_globs_are_sorted(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt")[0] == ["a.txt", "b.txt"]


def test_hub_source_reads_a_local_dataset_with_the_real_library(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes(jsonl_bytes())
    assert read(f"hf:{data}")[0] == TEXTS
    with pytest.raises(SlmError, match="no field 'body'; its fields: text, n"):
        read(f"hf:{data}", text_field="body")
    with pytest.raises(SlmError, match=r"hf:no-such/dataset-anywhere: no such directory here, and the Hub was not rea"):
        read("hf:no-such/dataset-anywhere")


def test_hub_source_takes_the_records_that_a_condition_names(tmp_path):
    records = [{"text": f"text {i}", "meta": {"set": "a b" if i % 3 else "c"}} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read(f"hf:{tmp_path}?meta.set=c")[0] == ["text 0", "text 3", "text 6"]
    assert len(read(f"hf:{tmp_path}?meta.set=a b")[0]) == 6
    with pytest.raises(SlmError, match=r"have no field 'meta\.kind'; their fields: text, meta"):
        read(f"hf:{tmp_path}?meta.kind=c")


def test_docs_source(tmp_path):
    found, _ = read("docs:click")
    assert len(found) > 50 and any("command" in text for text in found)
    with pytest.raises(SlmError, match=r"'clik' is not installed here \(did you mean click\?\)"):
        read("docs:clik")
    assert read("docs:click,-click")[0] == []
    both, _ = read("docs:click,pluggy")
    assert len(both) == len(found) + len(read("docs:pluggy")[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', r"a\.jsonl:3: no field 'text'; its fields: body"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: expected an object with a field 'text', found a list"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is a int"),
        ("a.csv", b"title,body\nx,y\n", r"a\.csv:1: no field 'text'; its fields: title, body"),
        ("a.parquet", b"not parquet", r"a\.parquet: damaged or not a parquet file"),
        ("a.jsonl.gz", gzip.compress(jsonl_bytes() * 100)[:-20], r"a\.jsonl\.gz: truncated or damaged gzip"),
        ("a.jsonl.gz", b"plain text", r"a\.jsonl\.gz ends in \.gz but is not compressed"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(b"words " * 9999)[:-8], r"a\.txt\.zst: truncated or damaged"),
        ("a.exe", b"x", r"a\.exe: unknown kind of file; known: .*jsonl"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlmError, match=message):
        read(tmp_path / name)


def test_missing_files(tmp_path):
    with pytest.raises(SlmError, match=r"gone\.jsonl: no such file"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(SlmError, match="no such file; check the path or the pattern"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(SlmError, match="no text files in this directory"):
        read(tmp_path)


def test_invalid_utf8_is_counted_or_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine"}\n{"text": "\\ud800"}\n')
    found, reading = read(path)
    assert found[0] == "caf\ufffd" and found[1] == "fine" and reading.replaced == 2
    with pytest.raises(SlmError, match=r"a\.jsonl:1: invalid UTF-8"):
        read(path, strict=True)


def test_empty_and_white_files_hold_no_documents(tmp_path):
    for name, content in (("a.txt", b""), ("b.txt", b" \n\t\n"), ("c.jsonl", b'{"text": "  "}\n{"text": ""}\n')):
        (tmp_path / name).write_bytes(content)
        assert list(read_file(tmp_path / name, Reading())) == []
    _, reading = read(tmp_path / "*.*")
    assert len(reading.empty_files) == 3


def test_split_prefixes_and_fingerprints(tmp_path):
    assert Source.parse("valid=x=y.txt") == Source("x=y.txt", "valid")
    assert Source.parse("a=b.txt") == Source("a=b.txt", None)
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = Source.parse(str(path)).fingerprint()
    assert Source.parse(str(path)).fingerprint() == before
    path.write_text("two")
    assert Source.parse(str(path)).fingerprint() != before


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.CSV.GZ", "a.Tsv.zst"])
@pytest.mark.parametrize(
    ("rows", "place"),
    [
        (["n,text", "1,one,two"], r":2: 3 fields, the header has 2"),
        (["n,text", "1,one", "2"], r":3: 1 fields, the header has 2"),
        (["text", "one", "two,three"], r":3: 2 fields, the header has 1"),
        (["text,n,text", "a,1,b"], r":1: 2 columns are named 'text'"),
        (["n,text", '1,"one', "2,two"], r":2: not valid CSV"),
        (["n,text", '1,"so", he said'], r":2: "),
        (["a,b", "1,2"], r":1: no field 'text'; its fields: a, b"),
    ],
)
def test_no_table_loses_a_row_or_a_field(tmp_path, name, rows, place):
    raw = "".join(row + "\n" for row in rows).encode()
    if "sv.".lower() in name.lower() or name.endswith("tsv"):
        raw = raw.replace(b",", b"\t") if "tsv" in name.lower() else raw
    if name.lower().endswith(".gz"):
        raw = gzip.compress(raw)
    if name.lower().endswith(".zst"):
        raw = zstandard.ZstdCompressor().compress(raw)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(SlmError, match=re.escape(name) + place):
        read(tmp_path / name)


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_csv_with_another_delimiter(tmp_path, delimiter, mark):
    rows = [["n", "text"], ["1", "one, two; three | four"], ["2", 'a "b"\r\nc']]
    with open(tmp_path / "plain", "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    (tmp_path / "a.csv").write_bytes(mark + (tmp_path / "plain").read_bytes())
    assert read(tmp_path / "a.csv")[0] == [row[1] for row in rows[1:]]


def test_hidden_folders_are_left_out_and_counted(tmp_path):
    for name in (
        "a.md",
        ".b.md",
        ".git/c.txt",
        "sub/.venv/lib/d.md",
        "sub/e.txt",
        "._f.txt",
        "picture.png",
        ".x/.y/g.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found, reading = read(tmp_path)
    assert found == ["a.md", "sub/e.txt"] and reading.left_out == {"hidden": 5, "of unknown kind": 1}
    (tmp_path / "elsewhere").symlink_to("sub")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    reading = read(tmp_path)[1]
    assert reading.left_out["in a folder behind a link"] == reading.left_out["without bytes of its own"] == 1
    reading = read(tmp_path / "[ase]*")[1]
    assert reading.left_out == {"in a folder that the pattern names": 2}
    inside = tmp_path / ".x" / ".y"
    (inside / "h.txt").write_text("asked for")
    assert read(inside / "h.txt")[0] == ["asked for"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_encodings_with_a_mark_are_decoded_and_others_named(tmp_path, encoding, name):
    texts = ["Grüße aus Köln, 東京", "ещё один текст"]
    if "jsonl" in name:
        text = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    else:
        text = "text\n" + "".join(f'"{t}"\n' for t in texts) if "csv" in name else "\n".join(texts)
    raw = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    if encoding in ("utf-16-le", "utf-16-be"):  # no mark
        with pytest.raises(SlmError, match=f"{re.escape(name)}.*looks like {encoding[:6].upper()}"):
            read(tmp_path / name)
    else:
        found, reading = read(tmp_path / name)
        assert found == (["\n".join(texts)] if name == "a.txt" else texts) and not reading.replaced


@pytest.mark.parametrize("encoding", ["cp1251", "shift_jis", "gb18030", "koi8-r", "big5"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_text_of_another_encoding_is_refused(tmp_path, encoding, name):
    text = (
        "Съешь же ещё этих мягких французских булок да выпей чаю. "
        if encoding in ("cp1251", "koi8-r")
        else "我們今天去東京的圖書館看書。"
    )
    raw = (text * 30).encode(encoding, "ignore")
    if name.endswith("jsonl"):
        raw = b'{"text": "' + raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"}\n'
    if name.endswith("csv"):
        raw = b'text\n"' + raw.replace(b'"', b'""') + b'"\n'
    if name.endswith("parquet"):
        array = pyarrow.array([raw], pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(SlmError, match=rf"{re.escape(name)}.*(looks like|not a JSON object)"):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary", "string_view"])
def test_parquet_that_is_not_utf8(tmp_path, kind):
    raw = pyarrow.array([b"the caf\xe9", b"the market", None], pyarrow.binary())
    column = {
        "string": lambda: raw.view(pyarrow.string()),
        "large_string": lambda: raw.cast(pyarrow.large_binary()).view(pyarrow.large_string()),
        "binary": lambda: raw,
        "dictionary": lambda: raw.view(pyarrow.string()).dictionary_encode(),
        "string_view": lambda: raw.cast(pyarrow.binary_view()).view(pyarrow.string_view()),
    }[kind]()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    found, reading = read(tmp_path / "a.parquet")
    assert found == ["the caf\ufffd", "the market"] and reading.replaced == 1
    with pytest.raises(SlmError, match=r"a\.parquet, row 1: invalid UTF-8"):
        read(tmp_path / "a.parquet", strict=True)


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a":' * 100_000, b'{"text": "x", "a": ' + b"[" * 100_000])
def test_deep_nesting_is_one_sentence(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(SlmError, match=r"a\.jsonl:2: not a JSON object on one line \(nested too deeply\)"):
        read(tmp_path / "a.jsonl")


BOMBS = {
    "a.txt.gz": lambda size: gzip.compress(b"a" * size),
    "a.jsonl.gz": lambda size: gzip.compress(b'{"text": "' + b"a" * size + b'"}'),
    "a.csv.gz": lambda size: gzip.compress(b'text\n"' + b"a" * size + b'"\n'),
    "b.csv.gz": lambda size: gzip.compress(b"text," + b"a" * size),
    "c.csv.gz": lambda size: gzip.compress(b'text\n"' + b"a\n" * (size // 2) + b'"\n'),
    "a.txt.zst": lambda size: zstandard.ZstdCompressor(19).compress(b"a" * size),
    "a.jsonl.zst": lambda size: zstandard.ZstdCompressor(19).compress(b"\n" + b"[" * size),
    "a.txt": lambda size: b"a" * size,
    "a.jsonl": lambda size: b'{"text": "' + b"a" * size + b'"}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_document_without_an_end_is_an_error_and_memory_stays_bounded(tmp_path, name):
    """60 MB that become a document: read in pieces, refused at 1 MB, with less than 40 MB beside what is there."""
    (tmp_path / name).write_bytes(BOMBS[name](60_000_000))
    tracemalloc.start()
    with pytest.raises(SlmError, match=rf"{re.escape(name)}.*more than 1,000,000 bytes.*data\.max_document_bytes"):
        read(tmp_path / name, max_document_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


@pytest.mark.parametrize(
    ("size", "rows", "message"),
    [
        (80_000_000, 1, r"a\.parquet: .* bytes of its column 'text' stand for 80,0.*: no text is like that"),
        (15_000_000, 128, None),
        (2_000_000, 300, r"a\.parquet, row 1: a document of more than 1,000,000 bytes"),
    ],
)
def test_a_bomb_of_parquet(tmp_path, size, rows, message):
    """One value in a dictionary, for many rows: never more than a few of them in memory."""
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array(["a" * size])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    del column
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    try:
        if message:
            with pytest.raises(SlmError, match=message):
                read(tmp_path / "a.parquet", max_document_bytes=1_000_000)
        else:
            reading = Reading()
            assert all(len(text) == size for text in read_file(tmp_path / "a.parquet", reading))
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 20 * 15_000_000


def test_a_pipe_or_a_device_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for name in (str(tmp_path / "a.txt"), "/dev/zero", "/dev/null"):
        with pytest.raises(SlmError, match="not a file with bytes of its own"):
            read(name)
    with pytest.raises(SlmError):
        read("x" * 5000)


def test_a_source_that_vanishes(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    documents = Source.parse(str(tmp_path)).documents(Reading())
    next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(SlmError, match=r"b\.txt: gone while it was read"):
        list(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", ("Der Weg geht weiter bis zu den alten Häusern. " * 9).encode("cp1252"), None),
        (
            "a.txt",
            ("L'élève a été étonné par l'évêque à Noël. " * 20).encode("cp1252"),
            "looks like windows-1252",
        ),
        ("a.md", bytes(range(128, 256)) * 20, "no text in any encoding|looks like"),
        ("a.json", b'[\n {"text": "a"}\n]\n', r"make one line of each object with jq -c '\.\[\]'"),
        ("a.json", b'{"text": "a"} {"text": "b"}\n', r"make one line of each object with jq -c \."),
        ("a.json", b'[{"text": "a"}]\n', "found a list: make lines of it with jq"),
        ("a.csv", b"\n\ntext,n\n\none,1\n\n", None),
        ("a.csv", b"text,n\rone,1\rtwo,2\r", None),
        ("a.txt.gz", gzip.compress(b"one ", mtime=0) + gzip.compress(b"two", mtime=0), None),
        ("a.txt.gz", gzip.compress(b"one", mtime=0) + b"garbage", "truncated or damaged gzip"),
    ],
)
def test_what_people_have(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    if message:
        with pytest.raises(SlmError, match=message):
            read(tmp_path / name)
    else:
        assert read(tmp_path / name)[0]


@pytest.mark.parametrize(
    "line",
    ['{"text": "a", "text": "b"}', '{"text": "a", "meta": {"x": 1, "x": 1}}', '{"text": "a", "te\\u0078t": "b"}'],
)
def test_a_key_that_is_there_twice(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(SlmError, match=r"a\.jsonl:2: .*the key '(text|x)' is there twice"):
        read(tmp_path / "a.jsonl")


def test_lines_of_a_table_after_empty_ones(tmp_path):
    (tmp_path / "a.csv").write_text("\n\ntext,n\none,1\ntwo\n")
    with pytest.raises(SlmError, match=r"a\.csv:5: 1 fields, the header has 2"):
        read(tmp_path / "a.csv")


def test_a_column_whose_name_has_a_dot(tmp_path):
    struct = pyarrow.array([{"b": "of the struct"}])
    table = pyarrow.Table.from_arrays([struct, pyarrow.array(["of the column"])], names=["a", "a.b"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="a.b")[0] == ["of the column"]


@pytest.mark.parametrize(
    ("name", "compress", "message"),
    [
        ("a.jsonl", gzip.compress, r"is compressed, as a file that ends in \.gz"),
        ("a.txt", zstandard.compress, r"is compressed, as a file that ends in \.zst"),
        ("a.csv.gz", zstandard.compress, r"is compressed, as a file that ends in \.zst"),
        ("a.jsonl.gz", bytes, "ends in .gz but is not compressed that way"),
        ("a.md.zst", bytes, "ends in .zst but is not compressed that way"),
    ],
)
def test_a_name_that_says_another_compression(tmp_path, name, compress, message):
    (tmp_path / name).write_bytes(compress(b'{"text": "one"}\n'))
    with pytest.raises(SlmError, match=message):
        read(tmp_path / name)


def test_frames_that_zstd_skips_are_skipped(tmp_path):
    skipped = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    (tmp_path / "a.txt.zst").write_bytes(skipped + zstandard.compress(b"one"))
    assert read(tmp_path / "a.txt.zst")[0] == ["one"]


def test_a_column_of_zeros_beside_the_text_is_no_bomb(tmp_path):
    zeros = pyarrow.array([bytes(1000)] * 70_000, pyarrow.binary(1000))
    table = pyarrow.table({"n": zeros, "text": pyarrow.nulls(70_000, pyarrow.string())})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", use_dictionary=False, compression="zstd", data_page_size=1 << 27
    )
    column = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    assert column.total_uncompressed_size > max(BOMB_BYTES, BOMB_RATIO * column.total_compressed_size)
    assert next(read_file(tmp_path / "a.parquet", Reading()), None) is None


def test_two_columns_of_one_name_in_parquet(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SlmError, match="several columns are named 'text'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "raw", [b"\xff\xfeh\0i\0\0\xd8x\0", b"\xff\xfeh\0i\0x", b"\xfe\xff\xdc\0\0h", b"\xff\xfe\0\0\xff"]
)
def test_a_damaged_utf16_is_an_error(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(SlmError, match=r"a\.txt: its utf-(16|32)-.. is damaged"):
        read(tmp_path / "a.txt")


def test_a_parquet_file_that_loses_rows_or_bytes_is_an_error(tmp_path):
    path, texts = tmp_path / "a.parquet", [f"document {i}" for i in range(40)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, write_page_checksum=True, compression="none")
    raw = path.read_bytes()
    for place in range(0, len(raw), 3):
        damaged = bytearray(raw)
        damaged[place] ^= 5
        path.write_bytes(damaged)
        try:
            assert read(path)[0] == texts
        except SlmError as error:
            assert "a.parquet" in str(error)


@pytest.mark.parametrize("kind", [pyarrow.date32(), pyarrow.date64(), pyarrow.timestamp("s"), pyarrow.duration("s")])
def test_a_parquet_column_of_dates_is_no_text(tmp_path, kind):
    numbers = pyarrow.array([2**31 - 1], pyarrow.int32() if kind == pyarrow.date32() else pyarrow.int64())
    pyarrow.parquet.write_table(pyarrow.table({"text": numbers.view(kind)}), tmp_path / "a.parquet")
    with pytest.raises(SlmError, match=r"a\.parquet"):
        read(tmp_path / "a.parquet")
