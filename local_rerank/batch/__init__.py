"""Batch jobs: score files of queries and documents.

`rows` defines a record and `scoring` scores blocks of them without knowing about files. Around them are the readers
(`sources`, `trec_source`, `parquet`), the writers (`sinks`), the table of file formats (`formats`), the score cache and
`job`, which resumes after a kill. `ray_data` runs the same scoring on a Ray cluster, in `pieces` of the input.
"""
