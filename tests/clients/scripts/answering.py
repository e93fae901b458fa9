"""What every script here shares: jobs in, answers out. The form of both stands in `tests/clients/driver.py`."""

import json
import sys

ERROR_FIELDS = ("status_code", "code", "message", "request_id")


def run(call):
    """Answer each job on standard input by `call(job)`; an exception is an answer too."""
    json.dump([answer(call, job) for job in json.load(sys.stdin)], sys.stdout, default=str)


def answer(call, job):
    try:
        return call(job)
    except Exception as error:
        names = (*ERROR_FIELDS, "http_status")
        fields = {name: getattr(error, name) for name in names if hasattr(error, name)}
        return {"error": {"type": type(error).__name__, "text": str(error), **fields}}


def answered(results, total_tokens=None, request_id=None):
    """An answer, with what of it the client shows."""
    shown = {"total_tokens": total_tokens, "request_id": request_id}
    return {"results": list(results), **{name: value for name, value in shown.items() if value is not None}}


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
