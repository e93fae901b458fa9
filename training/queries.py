"""Step 2: generate queries from passages by rules.

Kinds: titles, keywords, "what is" questions, clauses turned into questions, sentences with a span replaced by a
question word, and neighbouring sentences. Some words are replaced by WordNet synonyms or get a typing error. Queries
need not be good, because the model learns the teachers' scores of the candidates.

``python queries.py --work training/work`` writes ``queries.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from pathlib import Path

from sources import synsets

SEED = 20261123
# Mean number of queries per passage; encyclopaedic text gets more than manuals.
WEIGHTS = {"wikipedia-sample": 1.6, "wordnet": 0.7, "descriptions": 0.8, "libreoffice-help": 0.6, "python-doc": 0.8,
           "postgresql-doc": 0.7, "git-doc": 0.6, "libreoffice-help-zh": 0.6, "manpages-zh": 0.8}  # fmt: skip
STOP = set(
    "a an and are as at be been but by can could do does for from had has have he her his how i if in into is it its "
    "may more most no not of on or other our out over she so some such than that the their them then there these they "
    "this those to up was we were what when where which who will with would you your also any each only very".split()
)
STOP_ZH = set("的了在是我有和就不人都一上也很到说要去你会着没看好自这那为与及或而其以于等中可被把从对")
FORMS_ZH = ["如何{}？", "怎么{}", "为什么{}？", "{}", "{}吗？", "{}有哪些？", "{}的方法", "{}的作用是什么", "{}的原因"]
TITLE_FORMS = {
    "en": ["what is {}", "what does {} mean", "definition of {}", "{} meaning", "tell me about {}", "What is {}?"],
    "zh": ["什么是{}", "{}是什么意思", "{}是什么？", "请介绍{}", "{}的定义", "{}怎么用"],
}
KINDS = {
    "en": {"title": 12, "what_is": 9, "keywords": 15, "asked_span": 36, "clause": 16, "neighbour": 12},
    "zh": {"title": 12, "what_is": 10, "keywords": 10, "asked_span": 38, "clause": 18, "neighbour": 12},
}


def synonyms(wordnet: Path) -> dict[str, list[str]]:
    """Read single-word synonyms of the most frequent sense of nouns and verbs."""
    table: dict[str, list[str]] = defaultdict(list)
    for kind in ("noun", "verb", "adj"):
        for words, _ in synsets(wordnet, kind):
            plain = [w.lower() for w in words if w.isalpha() and len(w) > 2]
            for word in plain:
                if word not in table:
                    table[word] = [other for other in plain if other != word]
    return {word: others for word, others in table.items() if others}


class Maker:
    """Generates queries of all kinds from passages; deterministic for a given `rng`."""

    def __init__(self, rng: random.Random, table: dict[str, list[str]]) -> None:
        self.rng, self.table = rng, table

    def sentences(self, text: str, language: str) -> list[str]:
        """Split a passage into sentences."""
        pattern = r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])" if language == "en" else r"(?<=[。！？；])"
        return [s.strip() for s in re.split(pattern, text) if s.strip()]

    def make(self, passage: dict[str, str], neighbour: str) -> tuple[str, str] | None:
        """Return the kind and text of a query, or None if the passage does not allow the chosen kind."""
        language = passage["language"]
        kinds = KINDS[language]
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        body = passage["text"]
        if passage["source"] in ("wordnet", "jionlp-words"):
            body = re.sub(r"^[^：:]{1,20}[：:]\s*", "", body)
        if kind in ("title", "what_is"):
            query = self.title(passage["title"], language, kind == "what_is")
        elif kind == "neighbour":
            query = neighbour
        elif kind == "keywords":
            query = self.keywords(body, language)
        else:
            sentence = self.rng.choice(self.sentences(body, language) or [""])
            maker = getattr(self, f"{kind}_{language}")
            query = maker(sentence)
        if language == "en" and kind in ("keywords", "asked_span", "clause") and self.rng.random() < 0.35:
            query = self.reword(query)
        if self.rng.random() < 0.03:
            query = self.mistype(query)
        units = len(query.split()) if language == "en" else len(query)
        return (kind, query) if 1 <= units <= (40 if language == "en" else 60) and len(query) > 1 else None

    def title(self, title: str, language: str, ask: bool) -> str:
        """Return the title, or a question about it."""
        title = title.split(",")[0] if ask else title
        if not ask or not title:
            return title
        return self.rng.choice(TITLE_FORMS[language]).format(title)

    def keywords(self, text: str, language: str) -> str:
        """Return three to seven content words, or two to four runs of characters."""
        if language == "en":
            words = [w for w in re.findall(r"[A-Za-z][A-Za-z0-9-]+", text) if w.lower() not in STOP]
            count = min(len(words), self.rng.randint(3, 7))
            picked = sorted(self.rng.sample(range(len(words)), count))
            return " ".join(words[i] for i in picked)
        runs = [r for r in re.split(r"[^\u4e00-\u9fffA-Za-z0-9]|[的了在是和与或等及]", text) if len(r) >= 2]
        picked = sorted(self.rng.sample(range(len(runs)), min(len(runs), self.rng.randint(2, 4))))
        return " ".join(runs[i][:6] for i in picked)

    def asked_span_en(self, sentence: str) -> str:
        """Replace a span of a sentence by its question word."""
        words = sentence.rstrip(".!?;:").split()
        if len(words) < 6:
            return " ".join(words)
        numbers = [i for i, w in enumerate(words) if re.search(r"\d", w)]
        names = [i for i, w in enumerate(words) if i and w[0].isupper()]
        draw = self.rng.random()
        if numbers and draw < 0.35:
            at = self.rng.choice(numbers)
            span, asks = (at, at + 1), ["when", "what year"] if re.search(r"1\d{3}|20\d\d", words[at]) else ["how many"]
        elif names and draw < 0.65:
            at = end = self.rng.choice(names)
            while end < len(words) and words[end][0].isupper():
                end += 1
            span, asks = (at, end), ["who", "what", "which", "where"]
        elif draw < 0.85:
            span, asks = (0, self.rng.randint(1, 4)), ["what", "which", "who"]
        else:
            at = self.rng.randint(1, len(words) - 3)
            span, asks = (at, at + self.rng.randint(1, 3)), ["what", "how", "why"]
        rest = words[: span[0]] + words[span[1] :]
        room = self.rng.randint(5, 14)
        near = max(0, min(span[0] - room // 2, len(rest) - room))
        kept = rest[near : near + room]
        if len(kept) > 6:
            kept = [w for w in kept if w.lower() not in STOP or self.rng.random() < 0.7]
        ask = self.rng.choice(asks)
        helper = self.rng.choice(["", "", "is", "was", "did", "does", "are"])
        question = " ".join(f"{ask} {helper} {' '.join(kept)}".split()).rstrip(",;")
        return question[0].upper() + question[1:] + "?" if self.rng.random() < 0.6 else question.lower()

    def asked_span_zh(self, sentence: str) -> str:
        """Replace a span of a sentence by its question word, at the end or in place."""
        text = sentence.rstrip("。！？；;.,，")
        if len(text) < 8:
            return text
        number = re.search(r"\d[\d.,]*", text)
        if number and self.rng.random() < 0.4:
            ask = "哪一年" if re.fullmatch(r"[12]\d{3}", number[0]) else "多少"
            out = text[: number.start()] + ask + text[number.end() :]
        else:
            at = self.rng.randint(0, len(text) - 5)
            ask = self.rng.choice(["什么", "什么", "谁", "哪些", "哪里", "哪个"])
            out = text[:at] + ask + text[at + self.rng.randint(2, 5) :]
        at = out.index(ask)
        room = self.rng.randint(10, 26)
        start = max(0, min(at - room // 2, len(out) - room))
        out = out[start : start + room]
        if ask not in out:
            out += ask
        return out.strip("，、 ,") + self.rng.choice(["？", "？", ""])

    def clause_en(self, sentence: str) -> str:
        """Put a clause after the beginning of a question."""
        clause = self.rng.choice([c for c in re.split(r"[,;:()]", sentence) if len(c.split()) >= 4] or [sentence])
        words = clause.rstrip(".!?").split()
        count = self.rng.randint(4, 10)
        start = self.rng.randint(0, max(0, len(words) - count))
        kept = [w for w in words[start : start + count] if w.lower() not in STOP or self.rng.random() < 0.5]
        forms = ["how to {}", "how does {} work", "why {}", "what is the {}", "what are {}", "{}", "{}", "can {}?",
                 "what {}?", "the effect of {}", "methods for {}", "difference between {}",
                 "is it true that {}?"]  # fmt: skip
        return self.rng.choice(forms).format(" ".join(kept))

    def clause_zh(self, sentence: str) -> str:
        """Add the end or the beginning of a question to a clause."""
        clause = self.rng.choice([c for c in re.split(r"[，,；;：:（）()]", sentence) if len(c) >= 5] or [sentence])
        clause = clause.rstrip("。！？")
        count = self.rng.randint(5, 16)
        start = self.rng.randint(0, max(0, len(clause) - count))
        clause = clause[start : start + count]
        if self.rng.random() < 0.4:
            clause = "".join(c for c in clause if c not in STOP_ZH)
        return self.rng.choice(FORMS_ZH).format(clause)

    def reword(self, query: str) -> str:
        """Replace one or two words by a synonym."""
        words = query.split()
        places = [i for i, w in enumerate(words) if w.lower() in self.table and w.lower() not in STOP]
        for i in self.rng.sample(places, min(len(places), self.rng.randint(1, 2))):
            words[i] = self.rng.choice(self.table[words[i].lower()])
        return " ".join(words)

    def mistype(self, query: str) -> str:
        """Swap two neighbouring characters, or drop one."""
        if len(query) < 6:
            return query
        at = self.rng.randint(1, len(query) - 3)
        swapped = query[at + 1] + query[at] if self.rng.random() < 0.5 else query[at]
        return query[:at] + swapped + query[at + 2 :]


def main() -> None:
    """Draw passages by the weight of their source and generate a query for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/work"))
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the number of queries per passage")
    parser.add_argument("--limit", type=int, default=20480, help="maximum number of queries, after shuffling")
    arguments = parser.parse_args()
    rng = random.Random(SEED)
    passages = [json.loads(line) for line in (arguments.work / "passages.jsonl").open()]
    siblings: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, passage in enumerate(passages):
        siblings[passage["source"], passage["title"]].append(index)
    maker = Maker(rng, synonyms(arguments.work / "deb/usr/share/wordnet"))
    records = []
    for index, passage in enumerate(passages):
        weight = WEIGHTS.get(passage["source"], 1.0) * arguments.scale
        for _ in range(int(weight) + (rng.random() < weight % 1)):
            others = [i for i in siblings[passage["source"], passage["title"]] if i != index]
            text = passages[rng.choice(others)]["text"] if others else ""
            near = rng.choice(maker.sentences(text, passage["language"]) or [""])
            made = maker.make(passage, near)
            if made:
                records.append({"language": passage["language"], "kind": made[0], "source": index, "text": made[1]})
    rng.shuffle(records)
    records = records[: arguments.limit]
    with (arguments.work / "queries.jsonl").open("w") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    print(len(records), "queries;", sum(r["language"] == "zh" for r in records), "Chinese")


if __name__ == "__main__":
    main()
