"""Time and memory of train.py as its data grows: every size in fresh processes, once without a cache and once with it.

python benchmarks/data.py                     # 10,000, 100,000 and 1,000,000 rows
python benchmarks/data.py --sizes 1000 4000
"""

import argparse
import json
import tempfile
from itertools import cycle, islice
from pathlib import Path

from measure import ROOT, machine, run, table

FEW = 100  # rows of the run whose memory is the model's and the libraries' own


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    sizes = parser.parse_args().sizes
    with tempfile.TemporaryDirectory() as folder:
        found = {size: measure(size, Path(folder)) for size in [FEW, *sizes]}
    own = found[FEW]
    rows = []
    for size in sizes:
        first, second = found[size]["first"], found[size]["second"]
        work = first["seconds"] - own["first"]["seconds"]
        rows.append(
            [f"{size:,}", f"{found[size]['mib']:.0f}", f"{first['seconds']:.1f}", f"{work / size * 1e6:.0f}"]
            + [f"{size / work:,.0f}", f"{first['mib']:.0f}", f"{first['mib'] - own['first']['mib']:.0f}"]
            + [f"{second['seconds']:.1f}", f"{second['mib']:.0f}", f"{second['mib'] - own['second']['mib']:.0f}"]
        )
    print(machine())
    print(f"run of {FEW} rows: {own['first']['seconds']:.1f} s, {own['first']['mib']:.0f} MiB\n")
    header = ["rows", "file MiB", "first start s", "µs/row", "rows/s", "peak MiB", "beyond the model"]
    print(table([*header, "second start s", "peak MiB", "beyond the model"], rows))


def measure(size, folder):
    """{"mib": of the file, first, second: seconds and peak MiB} of `train.py --max_steps 1` on `size` short rows."""
    file = folder / f"{size}.jsonl"
    write_rows(file, size)
    command = [ROOT / "gemma_sft/ft_gemma/train.py", "--data_path", file, "--cache_dir", folder / "cache"]
    command += ["--model_save_dir", folder / f"out{size}", "--max_steps", 1, "--eval_rows", 0, "--val_set_size", 50]
    found = {"mib": file.stat().st_size / (1 << 20)}
    for start in ("first", "second"):
        _, seconds, mib = run([*command, "--resume", "never"])
        print(f"{size:,} rows, {start} start: {seconds:.1f} s, {mib:.0f} MiB", flush=True)
        found[start] = {"seconds": seconds, "mib": mib}
    return found


def write_rows(file, count):
    """`count` short rows, each another: shop rows of data/, cut and numbered."""
    shop = [json.loads(line) for line in (ROOT / "data/product_train.jsonl").read_text(encoding="utf-8").splitlines()]
    with file.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(islice(cycle(shop), count)):
            short = {"content": f"{row['content'][:30]}*编号#{number}", "summary": row["summary"][:30]}
            stream.write(json.dumps(short, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
