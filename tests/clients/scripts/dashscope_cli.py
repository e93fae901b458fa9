"""The DashScope SDK's command line, in this process: a process of its own takes seconds to start."""

import contextlib
import io
import json
import sys

import dashscope
from answering import ranked, run
from dashscope.cli import main


def call(job):
    dashscope.base_http_api_url = job["base_url"] + "/api/v1"
    dashscope.api_key = job["api_key"]
    sys.argv[1:] = arguments(job["request"])
    printed, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as exit:
            status = exit.code
    if status:  # the message is wrapped at the width of a terminal
        return {"error": {"exit_status": status, "message": " ".join(errors.getvalue().split())}}
    text = printed.getvalue()
    output, end = json.JSONDecoder().raw_decode(text)  # two documents: output and usage
    return {"results": ranked(output["results"]), "total_tokens": json.loads(text[end:])["total_tokens"]}


def arguments(request):
    yield from ("rerank", "create", "--model", request["model"], "--query", request["query"])
    for document in request["documents"]:
        yield from ("--document", document)
    if "top_n" in request:
        yield from ("--top-n", str(request["top_n"]))
    if "instruct" in request:
        yield from ("--instruct", request["instruct"])
    if request.get("return_documents"):
        yield "--return-documents"


run(call)
