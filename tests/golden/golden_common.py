"""What every golden file shares: where things lie, who made them, how numbers are written."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
TEXTS = GOLDEN / "texts"
FILE_BYTES_MAX = 1_000_000


def provenance(mode: str, packages: list, **extra) -> dict:
    """Who made a file: the command, the version of each package, and what else decides its bytes."""
    versions = {"python": platform.python_version()}
    versions |= {p.__name__: importlib.metadata.version(p.__name__).split("+")[0] for p in packages}
    return {"script": f"tests/golden/make_goldens.py {mode}", "versions": versions} | extra


def read_texts() -> list[tuple[str, str]]:
    """The texts of our own as (name, text), in the order of their file names."""
    return [(p.stem, p.read_text(encoding="utf-8")) for p in sorted(TEXTS.glob("*.txt"))]


def sha256_of(folder: Path, patterns: list[str]) -> dict[str, str]:
    """The files that a golden was made from, by name."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_golden(path: Path, value: dict) -> None:
    """Write one golden file: a line per leaf list, so that diffs show what moved, and never above 1 MB."""
    text = _layout(value, 0) + "\n"
    size = len(text.encode())
    if size > FILE_BYTES_MAX:
        raise SystemExit(f"{path.name} has {size:,} bytes; the limit is {FILE_BYTES_MAX:,}")
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{path.name}: {size:,} bytes")


def _layout(value, depth: int) -> str:
    """JSON with one line per key, lists of plain values on one line each."""
    pad, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(k, ensure_ascii=False)}: {_layout(v, depth + 1)}" for k, v in value.items()]
        return "{" + pad + ("," + pad).join(items) + end + "}"
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        return "[" + pad + ("," + pad).join(_layout(v, depth + 1) for v in value) + end + "]"
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
