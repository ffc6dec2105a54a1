"""How fast and in how much memory `nanorun prepare-data` makes shards.

    python scripts/bench_data.py rates [--mb 100] [--rounds 3] [--datasets PYTHON] [--json OUT]
    python scripts/bench_data.py sizes [--mb 100 250 500 1000 2000] [--tokenizer byte] [--rounds 2] [--json OUT]

The text is that of the State of the Union addresses: paragraphs drawn with a seed and joined into documents of a few
kilobytes, none twice, as JSON lines. `rates`: rounds over gpt2, what it is compared with, byte and char, each in a
process of its own. gpt2 is compared with

- tiktoken alone: `encode_ordinary_batch` on 2 threads, fed batches of 1 MB from memory; nothing is written;
- nanoGPT's way, stated anew here: `datasets.map` with `encode_ordinary` in 2 processes, and the ids written through
  a memory map. It needs the package `datasets`: `--datasets` names a Python that has it (and tiktoken); loading the
  texts into its tables is not counted.

`sizes`: time and peak memory against the size of the input. Rates count everything from the command's first read
to the written manifest; starting Python is not counted in `rates` and is in `sizes`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

DOCUMENT_BYTES = (1_000, 7_000)
BATCH_BYTES = 1 << 20
THREADS = 2


def documents(n_bytes: int, seed: int = 0) -> Iterator[str]:
    """Yield documents of a few kilobytes, `n_bytes` in all or little more."""
    from nanorun.data.sources import Reading, sotu

    texts = [str(document.text) for document in sotu.documents(Reading())]
    paragraphs = [part for text in texts for part in text.split("\n") if len(part) > 40]
    chance = random.Random(seed)
    while n_bytes > 0:
        wanted, document = chance.randint(*DOCUMENT_BYTES), ""
        while len(document) < wanted:
            document += chance.choice(paragraphs)[:3000] + "\n"
        n_bytes -= len(document.encode())
        yield document


def write_jsonl(path: Path, n_bytes: int) -> int:
    """Write documents as JSON lines; return their bytes of text."""
    total = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in documents(n_bytes):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            total += len(text.encode())
    return total


def texts_of(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def run_ours(path: Path, tokenizer: str) -> dict[str, float]:
    """Return seconds and tokens of one preparation."""
    from nanorun.data.prepare import prepare

    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        start = time.perf_counter()
        done = prepare("text", out=Path(name) / "out", inputs=[str(path)], tokenizer=tokenizer)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": done.manifest.n_tokens("train") + done.manifest.n_tokens("val")}


def run_tiktoken(path: Path) -> dict[str, float]:
    """Return seconds and tokens of tiktoken alone, on texts in memory."""
    from nanorun.data.tokenizers.tiktoken_files import load_encoding

    encoding, batches, size = load_encoding("gpt2"), [[]], 0
    for text in texts_of(path):
        batches[-1].append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
    start = time.perf_counter()
    tokens = sum(
        len(ids) for batch in batches for ids in encoding.encode_ordinary_batch(batch, num_threads=THREADS)
    )
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


NANOGPT_WAY = """
import json, sys, tempfile, time
import numpy as np, tiktoken
from datasets import Dataset, disable_caching, disable_progress_bars
disable_caching(); disable_progress_bars()
encoding = tiktoken.get_encoding("gpt2")
with open(sys.argv[1], encoding="utf-8") as file:
    table = Dataset.from_dict({"text": [json.loads(line)["text"] for line in file]})
def process(row):
    ids = encoding.encode_ordinary(row["text"])
    ids.append(encoding.eot_token)
    return {"ids": ids, "len": len(ids)}
start = time.perf_counter()
done = table.map(process, remove_columns=["text"], num_proc=2)
total = int(np.sum(done["len"], dtype=np.uint64))
with tempfile.NamedTemporaryFile(dir=sys.argv[2]) as out:
    array, at = np.memmap(out.name, dtype=np.uint16, mode="w+", shape=(total,)), 0
    for place in range(1024):
        part = done.shard(num_shards=1024, index=place, contiguous=True).with_format("numpy")
        ids = np.concatenate(part["ids"]) if len(part) else np.zeros(0, np.uint16)
        array[at : at + len(ids)] = ids
        at += len(ids)
    array.flush()
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": total}))
"""


def run_nanogpt(path: Path, python: str) -> dict[str, float]:
    """Return seconds and tokens of nanoGPT's way, in a Python that has `datasets`."""
    from nanorun.data.tokenizers import tiktoken_files

    tiktoken_files.load_encoding("gpt2")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TIKTOKEN_CACHE_DIR": str(tiktoken_files.cache_folder())}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", NANOGPT_WAY, str(path), str(path.parent)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"nanoGPT's way failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_a_process(*words: str) -> dict[str, Any]:
    """Run this script's `once` in a new process; add its peak memory, of all its threads."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "once", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)} failed")
    whole = time.perf_counter() - start
    return {**json.loads(output), "process_seconds": whole, "peak_memory_mib": usage.ru_maxrss / 1024}


def rates(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / "texts.jsonl"
    n_bytes = write_jsonl(path, int(asked.mb[0] * 1e6))
    ways = ["gpt2", "tiktoken", *(["nanogpt"] if asked.datasets else []), "byte", "char"]
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(asked.rounds):
        for way in ways:
            rounds[way].append(in_a_process(way, str(path), asked.datasets or ""))
            one = rounds[way][-1]
            print(f"{way}: {n_bytes / one['seconds'] / 1e6:.1f} MB/s", file=sys.stderr)
    found: dict[str, Any] = {"text_bytes": n_bytes, "rounds": rounds}
    found["mb_per_second"] = {
        way: statistics.median(n_bytes / 1e6 / one["seconds"] for one in ones) for way, ones in rounds.items()
    }
    found["tokens_per_second"] = {
        way: statistics.median(one["tokens"] / one["seconds"] for one in ones) for way, ones in rounds.items()
    }
    for other in ("tiktoken", "nanogpt"):
        if other in rounds:
            # A ratio of each round: what slows the machine for a while slows both.
            found[f"gpt2_over_{other}"] = statistics.median(
                (mine["tokens"] / mine["seconds"]) / (its["tokens"] / its["seconds"])
                for mine, its in zip(rounds["gpt2"], rounds[other])
            )
    return found


def sizes(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = []
    paths = {}
    for mb in asked.mb:
        paths[mb] = folder / f"texts_{mb}.jsonl"
        write_jsonl(paths[mb], int(mb * 1e6))
    for _ in range(asked.rounds):
        for mb, path in paths.items():
            one = in_a_process(asked.tokenizer, str(path), "")
            rows.append({"mb": mb, **one})
            print(f"{mb} MB: {one['seconds']:.2f} s, {one['peak_memory_mib']:.0f} MiB", file=sys.stderr)
    by_size = [[row for row in rows if row["mb"] == mb] for mb in asked.mb]
    per_mb = [min(row["seconds"] for row in same) / same[0]["mb"] for same in by_size]
    return {
        "tokenizer": asked.tokenizer,
        "rows": rows,
        "seconds_per_mb": dict(zip(map(str, asked.mb), per_mb)),
        "spread": max(per_mb) / min(per_mb) - 1,
        "peak_memory_mib": {
            str(mb): max(row["peak_memory_mib"] for row in same) for mb, same in zip(asked.mb, by_size)
        },
    }


def once(way: str, path: Path, python: str) -> dict[str, float]:
    if way == "tiktoken":
        return run_tiktoken(path)
    if way == "nanogpt":
        return run_nanogpt(path, python)
    return run_ours(path, way)


def main() -> None:
    if sys.argv[1:2] == ["once"]:
        print(json.dumps(once(sys.argv[2], Path(sys.argv[3]), sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["rates", "sizes"])
    parser.add_argument("--mb", type=float, nargs="+", help="MB of text (sizes: several)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="byte", help="of sizes")
    parser.add_argument(
        "--datasets", metavar="PYTHON", help="a Python with the packages datasets and tiktoken"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the texts and shards lie; a temporary folder without it"
    )
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    asked = parser.parse_args()
    asked.mb = asked.mb or ([100.0] if asked.what == "rates" else [100.0, 250.0, 500.0, 1000.0, 2000.0])
    if asked.folder and not asked.folder.is_dir():
        parser.error(f"{asked.folder} is no folder")
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        found = (rates if asked.what == "rates" else sizes)(asked, Path(name))
        found["disk_write_mb_per_second"] = disk_rate(Path(name))
    found |= {"what": asked.what, "machine": platform.machine(), "cores": os.cpu_count()}
    text = json.dumps(found, indent=1)
    if asked.json:
        asked.json.write_text(text + "\n")
    print(text)


def disk_rate(folder: Path) -> float:
    """Return MB/s of writing 200 MB and having them on the disk: no shard can be made faster."""
    block, path = bytes(1 << 20), folder / "disk"
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(200):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return 200 * len(block) / 1e6 / seconds


if __name__ == "__main__":
    main()
