"""Batch jobs: files of queries and documents in, the same with scores out.

`rows` says what a record is, `scoring` turns blocks of records into scored ones and knows of no file; around it are the
files (`sources`, `sinks`), the cache of scores, and the job, which goes on where it was killed.
"""
