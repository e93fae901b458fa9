"""The everyday questions in training/everyday: their form, their halves, and what their README says of each kind."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "training" / "everyday"
DOMAINS = {"support", "medicine", "law", "cooking", "travel", "code", "administration"}
LANGUAGES = {"natural": {"en", "zh"}, "decoys": {"en", "zh"}, "across": {"en-zh", "zh-en"}}
STOP_WORDS = set(
    "a an the of to in on for is are was be do does did i my me it its and or how what which who when where why can "
    "you your with if this that there from at by not no have has had so up as will would should after before without "
    "than then they them their".split()
)


def read(kind: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def terms(text: str) -> set[str]:
    """First five letters of each word, pairs of Chinese characters."""
    words = {word[:5] for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in STOP_WORDS}
    chinese = "".join(re.findall(r"[\u4e00-\u9fff]+", text))
    return words | {chinese[i : i + 2] for i in range(len(chinese) - 1)}


def half(identifier: str) -> str:
    """The half that README.md's rule gives."""
    stem, number = identifier[:-2], int(identifier[-2:])
    partner = f"{stem}{number + 1 if number % 2 else number - 1:02}"
    lower = min((identifier, partner), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return "development" if lower == identifier else "held-out"


@pytest.mark.parametrize("kind", LANGUAGES)
def test_questions_are_even_over_domains_halves_and_positions(kind: str) -> None:
    rows = read(kind)
    assert {row["language"] for row in rows} == LANGUAGES[kind]
    assert {row["domain"] for row in rows} == DOMAINS
    for row in rows:
        assert row["id"][:-3] == f"{kind}-{row['language']}-{row['domain']}"
        assert row["half"] == half(row["id"])
        assert len(row["documents"]) == 5
    for language in LANGUAGES[kind]:
        of_language = [row for row in rows if row["language"] == language]
        positions = Counter(row["right"] for row in of_language)
        assert set(positions) == set(range(5))
        assert max(positions.values()) - min(positions.values()) <= 1
        halves = Counter(row["half"] for row in of_language)
        assert abs(halves["development"] - halves["held-out"]) <= len(DOMAINS)
        sizes = Counter(row["domain"] for row in of_language)
        assert max(sizes.values()) - min(sizes.values()) <= 2


def test_no_question_and_no_passage_occurs_twice() -> None:
    rows = [row for kind in LANGUAGES for row in read(kind)]
    for texts in (
        [row["id"] for row in rows],
        [row["query"] for row in rows],
        [text for row in rows for text in row["documents"]],
    ):
        assert [text for text, count in Counter(texts).items() if count > 1] == []


def test_three_decoys_share_more_with_the_question_than_the_right_passage() -> None:
    for row in read("decoys"):
        query = terms(row["query"])
        shared = [len(query & terms(document)) for document in row["documents"]]
        assert sum(count > shared[row["right"]] for count in shared) >= 3, row["id"]


def test_length_does_not_tell_the_right_passage() -> None:
    """A score that only grows or falls with length must not profit: by chance a fifth is longest, a fifth shortest."""
    for kind in LANGUAGES:
        rows = read(kind)
        ranks = Counter(sorted(map(len, row["documents"])).index(len(row["documents"][row["right"]])) for row in rows)
        assert ranks[4] <= 0.4 * len(rows), (kind, "longest")
        assert ranks[0] <= 0.5 * len(rows), (kind, "shortest")
