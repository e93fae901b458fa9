"""Files of documents: each kind, chosen and dropped, and the errors for unreadable ones."""

from __future__ import annotations

import base64
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.playground.conftest import bodies_sent

FILES = {
    "lines.txt": (b'\xef\xbb\xbfone\r\n\r\ntwo, "half"\r\n', ["one", 'two, "half"'], "2 documents"),
    "array.json": ('["一", {"text": "two\\nlines"}]'.encode(), ["一", "two\nlines"], "2 documents"),
    "items.jsonl": (
        b'{"id": 1, "text": "one"}\n\n"two"\n{"document": "[three]"}',
        ["one", "two", "[three]"],
        "3 documents",
    ),
    "named.csv": (
        b'id,Text\r\n1,"a ""quoted"", cell"\r\n2,"two\nlines"\r\n3,\r\n4,plain',
        ['a "quoted", cell', "two\nlines", "plain"],
        "3 documents from the column “Text”",
    ),
    "semicolons.csv": (
        "nr;Notiz\n1;kurz, aber länger als die Nummer\n2;b\n".encode(),
        ["kurz, aber länger als die Nummer", "b"],
        "2 documents from the column “Notiz”, the one with most text; call a column “text” to choose it",
    ),
    "single.csv": (b"one\ntwo\n", ["one", "two"], "2 documents"),
}
UNREADABLE = {
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8"),
    "report.pdf": (b"%PDF", "report.pdf is not a .txt, .csv, .jsonl or .json file"),
    "broken.jsonl": (b'"fine"\n{"text": ', "broken.jsonl, line 2 is not JSON"),
    "number.jsonl": (b'"fine"\n5', "number.jsonl, line 2 is neither a string nor an object with text or document"),
    "object.json": (b"{}", "object.json is not a JSON array"),
    "open.csv": (b'text\n"no end', "open.csv, line 2: a quoted cell is not closed"),
}


def drop(page: Page, name: str, content: bytes, *, then_zeros: int = 0) -> None:
    """Drop a file on the documents' field; `then_zeros` bytes follow its content."""
    transfer = page.evaluate_handle(
        """([name, text, zeros]) => {
            const content = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([content, new Uint8Array(zeros)], name));
            return transfer;
        }""",
        [name, base64.b64encode(content).decode(), then_zeros],
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.locator("#documents").dispatch_event(kind, {"dataTransfer": transfer})


def note(page: Page) -> str:
    return page.locator("#documents-note").inner_text()


def test_a_dropped_file_of_any_kind_becomes_documents(page: Page) -> None:
    bodies = bodies_sent(page)
    page.get_by_label("Query").fill("q")
    for name, (content, documents, says) in FILES.items():
        drop(page, name, content)
        expect(page.locator("#documents-note")).to_have_text(f"{name}: {says}")
        assert "over" not in str(page.locator("#drop").get_attribute("class"))
        with page.expect_response("**/v1/local/rank") as answered:
            page.get_by_role("button", name="Rank").click()
        assert bodies[-1]["documents"] == documents, name
        asked = bodies[-1] | {"stream": False}  # a browser keeps no copy of a streamed body
        best = page.request.post(answered.value.url, data=asked).json()["results"][0]["document"]
        expect(page.locator(".document").first).to_have_text(best, use_inner_text=True)


def test_a_file_can_be_chosen_and_chosen_again(page: Page, tmp_path: Path) -> None:
    for text, says in (("one\ntwo", "2 documents"), ("three", "1 document")):
        (tmp_path / "chosen.txt").write_text(text)
        page.get_by_label("Choose a file").set_input_files(tmp_path / "chosen.txt")
        expect(page.locator("#documents-note")).to_have_text(f"chosen.txt: {says}")
        expect(page.get_by_label("Documents", exact=True)).to_have_value(text)


def test_an_unreadable_file_is_named_with_the_reason(page: Page) -> None:
    page.get_by_label("Documents", exact=True).fill("kept")
    for name, (content, message) in UNREADABLE.items():
        drop(page, name, content)
        expect(page.locator("#error")).to_contain_text(message)
        expect(page.get_by_label("Documents", exact=True)).to_have_value("kept")
    drop(page, "good.txt", b"one")
    expect(page.locator("#error")).to_be_hidden()


def test_a_file_that_is_too_large_for_the_page_is_refused_with_the_limit(page: Page) -> None:
    drop(page, "large.txt", b"", then_zeros=4 * 2**20 + 2**19)
    expect(page.locator("#error")).to_contain_text("large.txt has 4.5 MiB; this page accepts at most 4 MiB")


def test_a_file_dropped_beside_the_field_does_not_replace_the_page(page: Page) -> None:
    outcome = page.evaluate(
        """() => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(["x"], "x.txt"));
            const event = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
            return document.querySelector("header").dispatchEvent(event);
        }"""
    )
    assert outcome is False  # the default action was prevented
    assert note(page) == ""


def test_an_invalid_json_array_is_read_as_lines_with_a_note(page: Page) -> None:
    field = page.get_by_label("Documents", exact=True)
    for text, says in (
        ('["a", "b"]', "2 documents, from a JSON array"),
        ('["a", "b"', "1 document, one per line (not a valid JSON array: "),
        ("[1] Lee\n[2] Kim", "2 documents, one per line (not a valid JSON array: "),
        ("", ""),
    ):
        field.fill(text)
        assert note(page).startswith(says)
        assert bool(note(page)) == bool(says)
