"""What a value of --data_path names: folders, patterns, archives and URLs, with what is left out of them."""

import functools
import gzip
import http.server
import io
import json
import tarfile
import threading
import zipfile

import fsspec
import pytest

from common.checking import check
from common.data import dataset
from common.data.sources import read_records
from common.errors import UserError
from common.evaluation import asking, evaluate
from common.files import file_hash
from common.inputs import files_of, listing, show_files
from common.opened import split_member
from gemma_sft import prompt
from gemma_sft.ft_gemma.config import Config

QA = {"question": "问", "answer": "答"}
ROW = json.dumps(QA, ensure_ascii=False) + "\n"
TABLE = "question,answer\n问,答\n"


@pytest.fixture
def folder(tmp_path):
    """A folder as people have them: data, a file about it, hidden ones, a folder inside."""
    made = tmp_path / "数据"
    (made / "more").mkdir(parents=True)
    (made / ".cache").mkdir()
    for name, text in {
        "b.csv": TABLE,
        "a.jsonl": ROW * 2,
        "c.JSON": f"[{ROW}]",
        "._a.jsonl": "x",
        ".gitattributes": "x",
        "README.md": "x",
        "dataset_info.json": "{}",
        "more/d.jsonl": ROW,
        ".cache/e.jsonl": ROW,
    }.items():
        (made / name).write_text(text, encoding="utf-8")
    (made / "d.jsonl.gz").write_bytes(gzip.compress(ROW.encode()))
    return made


DATA = ["a.jsonl", "b.csv", "c.JSON", "d.jsonl.gz"]
BESIDE = ["._a.jsonl", ".cache/", ".gitattributes", "README.md", "dataset_info.json", "more/"]


def pack(path, files):
    """A zip or tar of {name: text}; its path."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, text in files.items():
                packed.writestr(name, text)
        return str(path)
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as packed:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            packed.addfile(member, io.BytesIO(text.encode()))
    return str(path)


def rows_of(spec):
    """[place] of every row of a spec, all of which say the same."""
    found = [(f"{path}:{record.line}", record.value) for path, _ in files_of([spec]) for record in read_records(path)]
    assert all(value == QA for _, value in found)
    return [where for where, _ in found]


@pytest.mark.parametrize("end", ["", "/", "/*"])
def test_the_data_files_of_a_folder_are_read_and_the_others_named(folder, capsys, end):
    assert rows_of(f"{folder}{end}") == [
        *(f"{folder}/a.jsonl:{line}" for line in (1, 2)),
        f"{folder}/b.csv:2",
        f"{folder}/c.JSON:1",
        f"{folder}/d.jsonl.gz:1",
    ]
    assert listing(f"{folder}{end}").left_out == BESIDE
    show_files([f"{folder}{end}", f"{folder}/a.jsonl"])
    said = f"数据 {folder}{end}: 4 个文件 files: {', '.join(DATA)}; 不读 left out: {', '.join(BESIDE)}\n"
    assert capsys.readouterr().out == said, "a file given by its name is not told"


def test_a_pattern_that_names_an_ending_takes_all_it_matches(folder):
    assert listing(f"{folder}/*.md").files == [f"{folder}/README.md"]
    assert [path for path, _ in files_of([f"{folder}/**/*.jsonl"])] == [f"{folder}/{name}" for name in PATHS_BELOW]
    assert listing(f"{folder}/[ab].*").files == [f"{folder}/a.jsonl", f"{folder}/b.csv"]


PATHS_BELOW = ["._a.jsonl", ".cache/e.jsonl", "a.jsonl", "more/d.jsonl"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl"):
        (tmp_path / name).write_text(ROW)
    assert rows_of(f"{tmp_path}/a[1].jsonl") == [f"{tmp_path}/a[1].jsonl:1"]


def test_a_sample_is_of_each_file(folder, capsys):
    assert files_of([f"{folder}#2"]) == [(f"{folder}/{name}", 2) for name in DATA]
    show_files([f"{folder}#2"])
    assert f"{folder}#2: 4 个文件 files, 各抽 2 行 2 rows of each: a.jsonl, " in capsys.readouterr().out


def test_many_names_are_counted(tmp_path, capsys):
    for number in range(30):
        (tmp_path / f"{number:02}.jsonl").touch()
    show_files([str(tmp_path)])
    out = capsys.readouterr().out
    assert "30 个文件 files: 00.jsonl, 01.jsonl, " in out and out.endswith("19.jsonl … (+10)\n")


@pytest.mark.parametrize(
    "names, words",
    [
        ([], ["there is no file"]),
        (["README.md", ".gitattributes"], ["no data file in it: .gitattributes, README.md"]),
        (["more/a.jsonl"], ["no data file in it: more/", "/**/*.jsonl'"]),
        (
            ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"],
            ["save_to_disk", "load_from_disk", "to_json"],
        ),
    ],
)
def test_a_folder_without_data_is_an_error(tmp_path, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        files_of([str(tmp_path)], "eval_data_path")
    text = str(error.value)
    assert text.startswith(f"{tmp_path}: ") and text.endswith("; check --eval_data_path") and "\n" not in text
    assert [word for word in words if word not in text] == []


def test_a_pattern_without_a_match_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"\*.csv: 没有文件 there is no file; check --data_path"):
        files_of([f"{tmp_path}/*.csv"])


FILES = {"in/a.jsonl": ROW, "b.csv": TABLE, "说明.md": "x", "__MACOSX/in/._a.jsonl": "x"}


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz"])
def test_all_data_files_of_an_archive_are_read(tmp_path, name, capsys):
    path = pack(tmp_path / name, FILES)
    assert sorted(rows_of(path)) == [f"{path}/b.csv:2", f"{path}/in/a.jsonl:1"]
    assert file_hash(f"{path}/in/a.jsonl") == file_hash_of(tmp_path, ROW)
    show_files([path])
    said = f"数据 {path}: 2 个文件 files: b.csv, in/a.jsonl; 不读 left out: __MACOSX/in/._a.jsonl, 说明.md\n"
    assert capsys.readouterr().out == said
    inside = listing(str(tmp_path))
    assert inside.files == [f"{path}/b.csv", f"{path}/in/a.jsonl"]
    assert inside.left_out == ["plain", f"{name}/__MACOSX/in/._a.jsonl", f"{name}/说明.md"]


def file_hash_of(folder, text):
    """The hash of a file of this text."""
    (folder / "plain").write_text(text, encoding="utf-8")
    return file_hash(str(folder / "plain"))


def test_a_zip_of_one_file_is_that_file(tmp_path):
    path = pack(tmp_path / "x.zip", {"anything": ROW})
    assert rows_of(path) == [f"{path}:1"]


@pytest.mark.parametrize(
    "files, words",
    [
        ({"[Content_Types].xml": "x", "xl/workbook.xml": "x"}, "Excel"),
        ({"[Content_Types].xml": "x", "word/document.xml": "x"}, "Word"),
        ({"a.txt": "x", "b.md": "x"}, "no data file in it: a.txt, b.md"),
    ],
)
def test_an_archive_without_rows_is_named(tmp_path, files, words):
    path = pack(tmp_path / "x.zip", files)
    with pytest.raises(UserError, match=f"x.zip: .*{words}"):
        files_of([path])


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_a_broken_archive_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(UserError, match=f"{name}: .*cannot be opened"):
        files_of([str(tmp_path / name)])


def test_a_file_that_is_gone_from_an_archive_is_one_line(tmp_path):
    for name in ("x.zip", "x.tar.gz"):
        path = pack(tmp_path / name, FILES)
        with pytest.raises(UserError, match="none.jsonl"):
            list(read_records(f"{path}/none.jsonl"))


@pytest.mark.parametrize(
    "path", ["a.jsonl", "x.zip", "x.zip/readme", "https://h/x.zip/a.jsonl", "zip://a.jsonl::x.zip/b"]
)
def test_other_paths_name_no_member(path):
    assert split_member(path) == (path, "")


def test_a_folder_may_be_named_like_an_archive(tmp_path):
    made = tmp_path / "x.zip"
    made.mkdir()
    (made / "a.jsonl").write_text(ROW)
    assert rows_of(str(made)) == [f"{made}/a.jsonl:1"]


def test_urls_of_folders_patterns_and_archives(folder, tmp_path):
    files = fsspec.filesystem("memory")
    packed = pack(tmp_path / "x.zip", FILES)
    files.pipe({"/inputs/a.jsonl": ROW.encode(), "/inputs/b.md": b"x"})
    try:
        assert rows_of("memory://inputs") == rows_of("memory://inputs/*.jsonl") == ["memory:///inputs/a.jsonl:1"]
        assert listing("memory://inputs").left_out == ["b.md"]
        with open(packed, "rb") as content:
            files.pipe("/inputs/x.zip", content.read())
        found = ["memory://inputs/x.zip/b.csv:2", "memory://inputs/x.zip/in/a.jsonl:1"]
        assert sorted(rows_of("memory://inputs/x.zip")) == found
    finally:
        files.rm("/inputs", recursive=True)
    assert rows_of(f"file://{folder}/*.csv") == [f"file://{folder}/b.csv:2"]
    assert rows_of(f"zip://*.csv::{packed}") == [f"zip://b.csv::{packed}:2"]
    assert rows_of(f"zip://in/a.jsonl::{packed}") == [f"zip://in/a.jsonl::{packed}:1"]


@pytest.fixture
def web(tmp_path):
    """web(name, bytes): the URL of a file on a server of this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if not self.path.startswith("/cut"):
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(ROW.encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()

    def put(name, content):
        (tmp_path / name).write_bytes(content)
        return f"http://127.0.0.1:{server.server_port}/{name}"

    yield put
    server.shutdown()
    server.server_close()
    thread.join()


def test_files_of_the_web_need_no_further_package(web):
    url = web("a.jsonl", ROW.encode())
    assert rows_of(url) == [f"{url}:1"]
    packed = web("b.jsonl.gz", gzip.compress(ROW.encode()))
    assert rows_of(f"{packed}?download=true") == [f"{packed}?download=true:1"]
    assert listing("https://127.0.0.1:9/none/") == (["https://127.0.0.1:9/none/"], []), "nothing is asked yet"


@pytest.mark.parametrize(
    "name, words",
    [("none.jsonl", "404"), ("cut.jsonl", "cut off"), ("page.jsonl", "an HTML or XML page")],
)
def test_what_the_web_does_not_give_is_one_line(web, name, words):
    url = web("page.jsonl", b"<html>please log in</html>").replace("page.jsonl", name)
    with pytest.raises(UserError) as error:
        list(read_records(url))
    assert str(error.value).startswith(f"{url}: ") and words in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="http://127.0.0.1:9/a.jsonl: .*cannot be opened"):
        list(read_records("http://127.0.0.1:9/a.jsonl"))


# ---------------------------------------------------------------- where they are used


def settings(tmp_path, *specs, **knobs):
    return Config(data_path=specs, cache_dir=str(tmp_path / "cache"), val_set_size=0, **knobs)


def test_a_folder_is_trained_on_file_by_file(folder, tmp_path, tokenizer):
    packed = pack(tmp_path / "x.zip", FILES)
    rows = dataset.prepare(settings(tmp_path, f"{folder}#3", packed), tokenizer, prompt)
    assert [(source["path"], source["rows"], source["used"]) for source in rows.sources] == [
        (f"{folder}/a.jsonl", 2, 3),
        *((f"{folder}/{name}", 1, 3) for name in DATA[1:]),
        *((f"{packed}/{name}", 1, 1) for name in ("b.csv", "in/a.jsonl")),
    ]
    assert all(len(source["sha256"]) == 64 for source in rows.sources)
    assert rows.train[-1]["where"] == f"{packed}/in/a.jsonl:1"


def test_held_out_rows_may_be_in_a_folder(folder, tmp_path):
    kept, left_out = asking.held_out(settings(tmp_path), [str(folder)], 0)
    assert [row.where.removeprefix(f"{folder}/") for row in kept] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.csv:2",
        "c.JSON:1",
        "d.jsonl.gz:1",
    ]
    assert left_out == []


def test_a_check_reports_a_folder_without_data_beside_the_others(folder, tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    cfg = settings(tmp_path, str(folder), str(tmp_path / "empty"), eval_data_path=(f"{folder}/more",))
    _, report = check.examine(cfg, tokenizer, prompt)
    assert report["rows"]["rows"] == 5 and report["overlap"]["held_out"] == 1
    unreadable = [finding for finding in report["findings"] if finding["kind"] == "unreadable file"]
    assert [(finding["where"], "no file" in finding["found"]) for finding in unreadable] == [
        (f"{tmp_path}/empty", True)
    ]


def test_evaluation_tells_the_files_of_a_folder(folder, tmp_path, capsys):
    cfg = settings(tmp_path, str(folder), model_save_dir=str(tmp_path / "none"), given=frozenset({"data_path"}))
    assert len(evaluate.rows_to_score(cfg, 3)) == 3
    assert capsys.readouterr().out.startswith(f"数据 {folder}: 4 个文件 files: {', '.join(DATA)}; 不读 left out: ")
