"""The training texts of the built-in model: the package of each, its licence, and how to read it.

A source is a Debian package (downloaded and unpacked, not installed), a Python wheel, or the package descriptions of
the Debian archive. The texts are used for training only and not shipped.
"""

from __future__ import annotations

import bz2
import gzip
import re
import subprocess
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

Passage = tuple[str, str]  # title (may be empty), text


@dataclass(frozen=True)
class TextSource:
    """A source of texts; `reader` names a function of this module, `path` is inside the unpacked package."""

    name: str
    language: str
    package: str
    licence: str
    reader: str
    path: str
    limit: int  # maximum number of passages, so that no source dominates


DEB = "deb/usr/share"
SOURCES = [
    TextSource("wordnet", "en", "wordnet-base=1:3.0-37", "WordNet (BSD-like)", "wordnet",
           f"{DEB}/wordnet", 2500),
    TextSource("foldoc", "en", "dict-foldoc=20230119-1", "GFDL-1.1+", "foldoc",
           f"{DEB}/dictd/foldoc.dict.dz", 1800),
    TextSource("python-doc", "en", "python3.11-doc=3.11.2-6+deb12u9", "PSF-2.0", "html",
           f"{DEB}/doc/python3.11/html", 1200),
    TextSource("postgresql-doc", "en", "postgresql-doc-15=15.20-0+deb12u1", "PostgreSQL", "html",
           f"{DEB}/doc/postgresql-doc-15/html", 800),
    TextSource("wikipedia-sample", "en", "gensim==4.4.0", "CC-BY-SA-3.0 (text), LGPL-2.1 (package)", "wikipedia",
           "wheel/gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2", 5000),
    TextSource("anarchism-faq", "en", "anarchism=15.3-3", "GFDL-1.1+ / GPL-2+", "html",
           f"{DEB}/doc/anarchism/html", 1200),
    TextSource("gnome-help", "en", "gnome-user-docs=43.0-2", "CC-BY-SA-3.0", "mallard",
           f"{DEB}/help/C", 400),
    TextSource("libreoffice-help", "en", "libreoffice-help-en-us=4:7.4.7-1+deb12u14", "MPL-2.0", "html",
           f"{DEB}/libreoffice/help/en-US", 500),
    TextSource("debian-handbook", "en", "debian-handbook=11.20220922", "GPL-2+ / CC-BY-SA-3.0", "html",
           f"{DEB}/doc/debian-handbook/html/en-US", 500),
    TextSource("git-doc", "en", "git-doc=1:2.39.5-0+deb12u3", "GPL-2", "html",
           f"{DEB}/doc/git/html", 300),
    TextSource("kde-edu", "en", "kstars-data=5:3.6.2-2, kalzium-data=4:22.12.3-1", "GFDL-1.2+", "docbook",
           f"{DEB}/doc/HTML/en", 400),
    TextSource("descriptions", "en", "Debian archive, Translation-en", "as each package", "descriptions",
           "lists/Translation-en", 1800),
    TextSource("jionlp-words", "zh", "jionlp==1.5.31", "Apache-2.0", "jionlp",
           "wheel/jionlp/dictionary/chinese_word_dictionary.zip", 5500),
    TextSource("libreoffice-help-zh", "zh", "libreoffice-help-zh-cn=4:7.4.7-1+deb12u14", "MPL-2.0", "html",
           f"{DEB}/libreoffice/help/zh-CN", 1300),
    TextSource("debian-handbook-zh", "zh", "debian-handbook=11.20220922", "GPL-2+ / CC-BY-SA-3.0", "html",
           f"{DEB}/doc/debian-handbook/html/zh-CN", 1100),
    TextSource("debian-reference-zh", "zh", "debian-reference-zh-cn=2.100", "GPL-2+", "html_zh",
           f"{DEB}/debian-reference", 500),
    TextSource("gimp-help-zh", "zh", "gimp-help-zh-cn=2.10.34-2", "GFDL-1.2+", "html",
           f"{DEB}/gimp/2.0/help/zh_CN", 200),
    TextSource("kicad-doc-zh", "zh", "kicad-doc-zh=6.0.11+dfsg-1", "GPL-3+ / CC-BY-3.0+", "html",
           f"{DEB}/doc/kicad/help/zh", 250),
    TextSource("debian-edu-zh", "zh", "debian-edu-doc-zh-cn=2.12.23~deb12u1", "GPL-2+", "html",
           f"{DEB}/doc/debian-edu-doc-zh-cn", 250),
    TextSource("gnome-help-zh", "zh", "gnome-user-docs=43.0-2", "CC-BY-SA-3.0", "mallard",
           f"{DEB}/help/zh_CN", 400),
    TextSource("manpages-zh", "zh", "manpages-zh=1.6.4.0-1", "GFDL-1.2 / as each page", "troff",
           f"{DEB}/man/zh_CN", 700),
    TextSource("descriptions-zh", "zh", "Debian archive, Translation-zh_CN", "as each package", "descriptions",
           "lists/Translation-zh_CN", 600),
]  # fmt: skip

BLOCKS = {"p", "li", "dd", "dt", "td", "th", "div", "section", "br", "title", "h1", "h2", "h3", "h4", "h5", "h6"}
SKIPPED = {"script", "style", "pre", "nav", "head", "footer", "table"}


class _Paragraphs(HTMLParser):
    """Collects paragraphs with their nearest heading."""

    def __init__(self) -> None:
        super().__init__()
        self.heading, self.buffer, self.skip = "", "", 0
        self.found: list[Passage] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self.skip += 1
        if tag in BLOCKS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self.skip = max(0, self.skip - 1)
        if tag in BLOCKS:
            self.flush(heading=tag[0] == "h" and tag[1:].isdigit())

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.buffer += data

    def flush(self, heading: bool = False) -> None:
        text, self.buffer = " ".join(self.buffer.split()), ""
        if heading and text:
            self.heading = re.sub(r"^(第?\s*[\d.]+\s*章?[.、]?|[A-Z]\.[\d.]+)\s*|[¶#]$", "", text).strip()
        elif text:
            self.found.append((self.heading, text))


def html(path: Path, pattern: str = "*.html") -> Iterator[Passage]:
    """Read all pages below a folder."""
    for file in sorted(path.rglob(pattern)):
        if re.search(r"genindex|copyright|license|gfdl|changelog|whatsnew/changelog", file.name.lower()):
            continue
        parser = _Paragraphs()
        parser.feed(file.read_text("utf-8", "replace"))
        parser.flush()
        yield from parser.found


def html_zh(path: Path) -> Iterator[Passage]:
    """Read the Chinese pages of a folder with several languages."""
    return html(path, "*.zh-cn.html")


def mallard(path: Path) -> Iterator[Passage]:
    """Read GNOME help: XML pages with <title> and <p>."""
    for file in sorted(path.rglob("*.page")):
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError:
            continue
        title = ""
        for node in root.iter():
            tag = node.tag.rsplit("}", 1)[-1] if isinstance(node.tag, str) else ""
            text = " ".join("".join(node.itertext()).split()) if tag in ("title", "p") else ""
            if tag == "title":
                title = text
            elif text:
                yield title, text


def docbook(path: Path) -> Iterator[Passage]:
    """Read KDE handbooks: compressed DocBook, without entities."""
    for file in sorted(path.rglob("*.docbook*")):
        data = bz2.decompress(file.read_bytes()) if file.suffix == ".bz2" else file.read_bytes()
        text = re.sub(r"&[\w.-]+;", " ", data.decode("utf-8", "replace"))
        title = ""
        for tag, body in re.findall(r"<(title|para)\b[^>]*>(.*?)</\1>", text, re.S):
            plain = " ".join(re.sub(r"<[^>]+>", " ", body).split())
            if tag == "title":
                title = plain
            elif plain:
                yield title, plain


def troff(path: Path) -> Iterator[Passage]:
    """Read manual pages: paragraphs between macros."""
    for file in sorted(path.rglob("*.gz")):
        try:
            lines = gzip.decompress(file.read_bytes()).decode("utf-8", "replace").splitlines()
        except (OSError, EOFError):
            continue
        paragraph, name = "", file.name.split(".")[0]
        for line in lines:
            if re.match(r"\.(SH|SS|PP|P|LP|TP|IP|nf|fi|Sh|Pp|It|sp)\b", line) or not line.strip():
                if paragraph:
                    yield name, paragraph
                paragraph = ""
                continue
            line = re.sub(r"^\.(B|I|BR|IR|RB|BI|RI|Nm|Fl|Ar|Xr|Pa|Dv)\s+", "", line)
            if line.startswith((".", "'")):
                continue
            paragraph += re.sub(r"\\f[A-Z]|\\f\(..|\\[&/|^%]|\\s[-+]?\d", "", line).replace("\\-", "-").strip() + " "
        if paragraph:
            yield name, paragraph


def wordnet(path: Path) -> Iterator[Passage]:
    """Read WordNet: a passage per synset with its gloss and examples; the title is its first words."""
    for kind in ("noun", "verb", "adj", "adv"):
        for words, gloss in synsets(path, kind):
            yield ", ".join(words[:2]), f"{words[0]}: {gloss}"


def synsets(path: Path, kind: str) -> Iterator[tuple[list[str], str]]:
    """Read words and gloss of each synset of a part of speech."""
    for line in (path / f"data.{kind}").read_text().splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        words = [re.sub(r"\(\w+\)", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))]
        yield words, gloss.strip()


def foldoc(path: Path) -> Iterator[Passage]:
    """Read FOLDOC: headwords at the margin, indented text."""
    title, body = "", ""
    for line in [*gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines(), "end"]:
        if line and not line[0].isspace() and not line.startswith("{") and len(line) < 60:
            if len(body) > 60 and not title.startswith("00-database"):
                yield title, body
            title, body = line.strip(), ""
        else:
            plain = re.sub(r"[{}]", "", line.strip())
            if not re.fullmatch(r"\(\d{4}-\d\d-\d\d\)", plain):
                body = f"{body} {re.sub(r'^<[^>]+>', '', plain).strip()}".strip()


def wikipedia(path: Path) -> Iterator[Passage]:
    """Read the Wikipedia extract without markup, each paragraph with its section."""
    page = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
    for title, text in page.findall(bz2.decompress(path.read_bytes()).decode("utf-8", "replace")):
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
        text = re.sub(
            r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->|<math.*?</math>|<gallery.*?</gallery>", "", text, flags=re.S
        )
        for _ in range(4):
            text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", text)
        text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
        text = re.sub(r"'{2,}|<[^>]+>|\[https?:\S+|&nbsp;|\]", " ", text)
        section = title
        for line in text.splitlines():
            if heading := re.match(r"=+\s*(.*?)\s*=+\s*$", line):
                section = f"{title} {heading[1]}"
                if heading[1] in (
                    "See also",
                    "References",
                    "External links",
                    "Further reading",
                    "Notes",
                    "Bibliography",
                ):
                    break
            elif len(line) > 60 and line[0] not in "*#:;|!{}":
                yield section, " ".join(line.split())


def descriptions(path: Path) -> Iterator[Passage]:
    """Read package descriptions: the short one is the title, the long one the text."""
    for entry in path.read_text("utf-8", "replace").split("\n\n"):
        match = re.search(r"^Description-(?:en|zh_CN): (.*)\n((?: .*\n?)*)", entry, re.M)
        if match and len(match[2]) > 40:
            first = match[2].split("\n .\n")[0]
            joiner = "" if path.name.endswith("zh_CN") else " "
            yield match[1], joiner.join(line.strip() for line in first.splitlines())


def jionlp(path: Path) -> Iterator[Passage]:
    """Read the Chinese dictionary: words with numbered senses."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read(archive.namelist()[0]).decode("utf-8", "replace")
    for line in text.splitlines():
        word, _, senses = line.partition("\t")
        plain = re.sub(r"\s*\d+\.\s*", "", senses).strip()
        if word and len(plain) >= 8:
            yield word, f"{word}：{plain}"


def unpack_lists(lists: Path, target: Path) -> None:
    """Decompress the archive's translation lists (lz4)."""
    target.mkdir(parents=True, exist_ok=True)
    for language, mark in (("en", "bookworm_main_i18n_Translation-en"), ("zh_CN", "Translation-zh%5fCN")):
        for file in lists.glob(f"*{mark}*"):
            with (target / f"Translation-{language}").open("wb") as out:
                subprocess.run(["lz4cat", str(file)], stdout=out, check=True)
