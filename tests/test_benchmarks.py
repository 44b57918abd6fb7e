"""The benchmarks start, and their own sums are right; what they measure is measured by hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    """benchmarks/ is where modules are found, for a test alone: its data.py is not the package data."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "data", raising=False)
    yield
    sys.modules.pop("data", None)


SCRIPTS = "busy chats check data engines generate gpu rest start train".split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--help"], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0 and f"python benchmarks/{script}" in found.stdout


def test_each_engine_has_its_packages():
    import engines
    import measure

    from common.elsewhere import asking

    pinned = measure.pinned(engines.__file__)
    assert set(pinned) == {"llama.cpp", *asking.ENGINES}
    assert all("==" in package for packages in pinned.values() for package in packages)


def test_a_table():
    import measure

    assert measure.table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_a_measured_process():
    import measure

    result, seconds, mib = measure.run(
        ["-c", "import time; x = bytearray(50 << 20); time.sleep(1); print('{\"a\": 1}')"]
    )
    assert result == {"a": 1} and seconds > 1 and 50 < mib < 500
    with pytest.raises(SystemExit, match="exit code 3\nwhy"):
        measure.run(["-c", "print('why'); raise SystemExit(3)"])


def test_rows_of_the_data_benchmark(tmp_path):
    import data

    data.write_rows(tmp_path / "a.jsonl", 5000)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 5000 == len({row["content"] for row in rows}) and max(len(row["summary"]) for row in rows) == 30


def test_a_model_is_known_by_its_name_or_its_folder(monkeypatch, capsys, small_gemma):
    import train

    for given in ("head", str(small_gemma)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", given])
        assert train.arguments().model == given
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "haed"])
    with pytest.raises(SystemExit, match="2"):
        train.arguments()
    assert "haed: none of quarter head 2b small, nor a folder with config.json" in capsys.readouterr().err


def test_a_part_on_the_gpu_has_the_time_that_is_left(tmp_path):
    import gpu

    assert gpu.finished([sys.executable, "-c", "pass"], 60)
    assert not gpu.finished([sys.executable, "-c", "raise SystemExit(1)"], 60)
    started = "import subprocess, sys; subprocess.run([sys.executable, '-c', %r])"
    writes = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    assert not gpu.finished([sys.executable, "-c", started % writes], 1)
    time.sleep(3)
    assert not (tmp_path / "late").exists()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["random rows", "a checkpoint and rows of a file", "as on a GPU"])
def test_training_is_measured(which, tmp_path):
    import gpu

    command = ["benchmarks/train.py", "--model", "small", "--rounds", "1", "--rows", "8", "--runs", "ours"]
    if which == "a checkpoint and rows of a file":
        command += ["--model", "gemma_sft/embedded", "--data", "data/product_train.jsonl"]
    if which == "as on a GPU":
        command = gpu.training(SimpleNamespace(model="small", data=None, rows=8))
        command += ["--runs", "ours", "--dtype", "float32"]  # TRL is not installed here, and some CPUs have no bfloat16
    found = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert found.returncode == 0, found.stderr
    line = next(line for line in found.stdout.splitlines() if line.startswith("| ours"))
    cells = line.strip("| ").split(" | ")
    assert cells[0] == "ours" and int(cells[1]) > int(cells[2]) > 0 and cells[-2:] == ["1.00", "1.00"]
