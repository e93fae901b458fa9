"""The DashScope SDK's command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

from answering import ranked, run


def call(job):
    environment = {
        "DASHSCOPE_HTTP_BASE_URL": job["base_url"] + "/api/v1",
        "DASHSCOPE_API_KEY": job["api_key"],
        "COLUMNS": "10000",  # its output is wrapped at the width of the terminal
    }
    command = [Path(sys.executable).with_name("dashscope"), *arguments(job["request"])]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": {"exit_status": done.returncode, "message": done.stderr}}
    output, end = json.JSONDecoder().raw_decode(done.stdout)  # two documents: output and usage
    return {"results": ranked(output["results"]), "total_tokens": json.loads(done.stdout[end:])["total_tokens"]}


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
