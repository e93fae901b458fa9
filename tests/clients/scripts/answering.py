"""What every script here shares: jobs in, answers out. The form of both stands in `tests/clients/driver.py`."""

import json
import sys

ERROR_FIELDS = ("status_code", "code", "message", "request_id")


def run(call):
    """Answer each job on standard input by `call(job)`; an exception is an answer too."""
    json.dump([answer(call, job) for job in json.load(sys.stdin)], sys.stdout)


def answer(call, job):
    try:
        return call(job)
    except Exception as error:
        fields = {name: getattr(error, name) for name in ERROR_FIELDS if hasattr(error, name)}
        return {"error": {"type": type(error).__name__, **fields}}


def ranked(results):
    """The results of a body in JSON, as an answer holds them."""
    return [
        {
            "index": result["index"],
            "relevance_score": result["relevance_score"],
            "text": (result.get("document") or {}).get("text"),
        }
        for result in results
    ]
