"""The table of file formats: which reader and writer a file name selects."""

from __future__ import annotations

import io
import shutil
from functools import partial
from pathlib import Path

from local_rerank.batch.durable import AppendFile, OutputStream
from local_rerank.batch.job import FROM_INPUT
from local_rerank.batch.rows import AddedColumns, json_line, to_record
from local_rerank.batch.sinks import Sink, TextSink, csv_line, flat_columns, flat_lines, missing_id, run_lines, tsv_line
from local_rerank.batch.sources import Delimited, JsonLines, Source
from local_rerank.errors import ConfigError, InvalidRequest
from local_rerank.text_files import name_of, open_utf8, plain_file, suffix_of

INPUT_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
OUTPUT_SUFFIXES = (*INPUT_SUFFIXES, ".run")
PLAIN_INPUT = f"{FROM_INPUT}plain"
STANDARD_INPUT = Path(name_of(None))
"""What a job calls standard input, of which it reads a copy."""


def judge_output(file: Path, source: Source) -> None:
    """Raise ConfigError before the work if the output cannot have the form that its name selects."""
    suffix = file.suffix.lower()
    if suffix == ".run" and source.is_pairs:
        raise ConfigError(f"output is {file}, a run, but the input has pairs, which have no ranking")
    if suffix == ".parquet":
        import local_rerank.batch.parquet  # noqa: F401  # raises ConfigError without its extra


def open_source(file: Path, folder: Path) -> Source:
    """Open the reader that the file name selects; `folder` takes a plain copy of a compressed file.

    Raises InvalidRequest.
    """
    suffix = suffix_of(file)
    if suffix not in INPUT_SUFFIXES:
        raise InvalidRequest(f"input is {file}; it must end in one of {', '.join(INPUT_SUFFIXES)}", field="input")
    if not file.is_file():
        raise InvalidRequest(f"input is {file}; there is no such file", field="input")
    try:
        if suffix == ".parquet":
            from local_rerank.batch.parquet import ParquetSource

            return ParquetSource(file)
        plain = plain_file(file, folder / PLAIN_INPUT, "input")
        return JsonLines(file, plain) if suffix == ".jsonl" else Delimited(file, plain, is_tsv=suffix == ".tsv")
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}", field="input") from error


def copy_standard_input(copy: Path) -> None:
    """Read standard input to its end, because a job reads its input twice. Raises InvalidRequest."""
    with open_utf8(None, "input") as stream, copy.open("xb") as target:
        shutil.copyfileobj(stream, target)


def open_standard_input(copy: Path) -> Source:
    """Open the reader that the copy's first line selects: JSON lines, or a header with or without tabs."""
    with copy.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"{")
    if first.lstrip().startswith((b"{", b"[")):
        return JsonLines(STANDARD_INPUT, copy)
    return Delimited(STANDARD_INPUT, copy, is_tsv=b"\t" in first)


def open_sink(
    file: Path,
    folder: Path,
    source: Source,
    *,
    model_id: str,
    added: AddedColumns = AddedColumns(),  # noqa: B008  # frozen
    spreadsheet_safe: bool = False,
    stream: io.RawIOBase | None = None,
) -> Sink:
    """Open the writer that the file name selects; `folder` is for unfinished data, `stream` takes the file's place.

    Raises ConfigError.
    """
    judge_output(file, source)
    suffix = file.suffix.lower()
    target = AppendFile(file) if stream is None else OutputStream(stream)
    if suffix == ".jsonl":
        return TextSink(target, lambda scored: json_line(to_record(scored, with_documents=added.with_documents)))
    if suffix == ".run":
        return TextSink(target, partial(run_lines, name=model_id.rpartition("/")[2]), refusal=missing_id)
    if suffix == ".parquet":
        from local_rerank.batch.parquet import ParquetSink, ParquetSource, output_schema

        found = source.schema if isinstance(source, ParquetSource) else None
        schema = output_schema(found, source.columns, is_pairs=source.is_pairs, added=added)
        return ParquetSink(file, folder, schema, with_documents=added.with_documents)
    names = flat_columns(source, added)
    line = partial(tsv_line if suffix == ".tsv" else csv_line, spreadsheet_safe=spreadsheet_safe)
    return TextSink(target, partial(flat_lines, names=names, line=line), header=line(names))
