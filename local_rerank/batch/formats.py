"""The table of file formats: which reader and writer a file name selects."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from local_rerank.batch.rows import json_line, to_record
from local_rerank.batch.sinks import Sink, TextSink, csv_line, flat_columns, flat_lines, missing_id, run_lines, tsv_line
from local_rerank.batch.sources import Delimited, JsonLines, Source
from local_rerank.errors import ConfigError, InvalidRequest

INPUT_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
OUTPUT_SUFFIXES = (*INPUT_SUFFIXES, ".run")


def open_source(file: Path) -> Source:
    """Open the reader that the file name selects; raises InvalidRequest."""
    suffix = file.suffix.lower()
    if suffix not in INPUT_SUFFIXES:
        raise InvalidRequest(f"input is {file}; it must end in one of {', '.join(INPUT_SUFFIXES)}", field="input")
    if not file.is_file():
        raise InvalidRequest(f"input is {file}; there is no such file", field="input")
    try:
        if suffix == ".parquet":
            from local_rerank.batch.parquet import ParquetSource

            return ParquetSource(file)
        return JsonLines(file) if suffix == ".jsonl" else Delimited(file)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}", field="input") from error


def open_sink(
    file: Path, folder: Path, source: Source, *, model_id: str, with_documents: bool, is_blended: bool
) -> Sink:
    """Open the writer that the file name selects; `folder` is for unfinished data. Raises ConfigError."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return TextSink(file, lambda scored: json_line(to_record(scored, with_documents=with_documents)))
    if suffix == ".run":
        if source.is_pairs:
            raise ConfigError(f"output is {file}, a run, but the input has pairs, which have no ranking")
        return TextSink(file, partial(run_lines, name=model_id.rpartition("/")[2]), refusal=missing_id)
    if suffix == ".parquet":
        from local_rerank.batch.parquet import ParquetSink, ParquetSource, output_schema

        found = source.schema if isinstance(source, ParquetSource) else None
        options = {"is_pairs": source.is_pairs, "with_documents": with_documents, "is_blended": is_blended}
        schema = output_schema(found, source.columns, **options)
        return ParquetSink(file, folder, schema, with_documents=with_documents)
    if suffix in (".csv", ".tsv"):
        names = flat_columns(source, with_documents=with_documents, is_blended=is_blended)
        line = tsv_line if suffix == ".tsv" else csv_line
        return TextSink(file, partial(flat_lines, names=names, line=line), header=line(names))
    raise ConfigError(f"output is {file}; it must end in one of {', '.join(OUTPUT_SUFFIXES)}")
