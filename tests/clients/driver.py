"""Calls vendors' SDKs: a script of `scripts/`, run in the environment of `<environment>.txt`, answers a list of jobs.

A job is JSON: `base_url` of the server, `api_key`, `entry` (which of the script's ways to call), `request` (query and
documents and, where the client can send them, model, top_n, return_documents, instruct).
An answer is JSON: `results` (index, relevance_score, text) with `total_tokens` and `request_id` where the client shows
them, or `error` with all that the client shows of it.

To add a client, add a `.txt` with exact pins (`make clients` installs it), a script and a row of `CLIENTS`. The
clients of a script share a process, because importing an SDK takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from local_rerank_server.config import HOSTED_INSTRUCTION

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-clients"

Request = dict[str, Any]
Answer = dict[str, Any]


VARIABLES = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else importing LiteLLM fetches a price list
"""The environment of a client's process."""


def environment_bin(environment: str) -> Path:
    """The folder of a client environment's programs."""
    path = ENVIRONMENTS / environment / "bin"
    assert path.is_dir(), f"{path} is missing; `make clients` installs it"
    return path


@dataclass(frozen=True, kw_only=True)
class Client:
    """One way to call the server, and what it can send and show."""

    environment: str
    script: str
    entry: str = ""
    sends: frozenset[str] = frozenset({"model", "top_n", "return_documents", "instruct"})
    sends_empty_texts: bool = True
    shows: frozenset[str] = frozenset({"total_tokens", "request_id"})
    hosted: bool = False  # whether it shows DashScope's error codes
    default_instruction: str | None = None  # None: the library's own
    server: Literal["keyed", "open"] = "keyed"  # open: requires no key, returns documents as strings
    # how a caller sees an error; hidden: as a crash
    errors: Literal["returned", "raised", "printed", "hidden"] = "raised"
    shows_log_odds: bool = False  # in place of scores
    shows_words: bool = True  # whether exceptions contain the server's message
    raises: Mapping[str, str] = field(default_factory=dict, hash=False)  # refusal to exception, if not hosted

    def __str__(self) -> str:
        return " ".join(filter(None, [self.environment, self.script.partition(".")[0], self.entry]))

    def sendable(self, request: Request) -> Request:
        """The part of a request that this client can send."""
        documents = [text for text in request["documents"] if text or self.sends_empty_texts]
        sent = {name: request[name] for name in request if name in {"query", *self.sends}}
        return sent | {"documents": documents}

    def job(self, base_url: str, key: str, request: Request) -> dict[str, Any]:
        return {"base_url": base_url, "api_key": key, "entry": self.entry, "request": self.sendable(request)}


def answer(
    environment: str, script: str, jobs: Sequence[dict[str, Any]], run_python: Callable[..., str]
) -> list[Answer]:
    """The answers to `jobs`, from one process."""
    path, given = HERE / "scripts" / script, json.dumps(jobs)
    text = path.read_text(encoding="utf-8")
    printed = (
        run_node(text, given) if path.suffix == ".mjs" else run_python(environment, text, path=str(path), given=given)
    )
    answers: list[Answer] = json.loads(printed)
    return answers


def run_node(text: str, given: str) -> str:
    """The program is an argument, so that Node looks for modules in the working folder."""
    command = ["node", "--input-type=module", "--eval", text]
    done = subprocess.run(
        command, input=given, cwd=ENVIRONMENTS / "node", capture_output=True, text=True, timeout=240, env=VARIABLES
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dashscope(environment: str, entry: str, errors: Literal["returned", "raised"]) -> Client:
    return Client(
        environment=environment,
        script="dashscope_sdk.py",
        entry=entry,
        hosted=True,
        default_instruction=HOSTED_INSTRUCTION,
        errors=errors,
    )


def framework(script: str, *sends: str, entry: str = "") -> Client:
    """A framework on the DashScope SDK, which returns indices and scores alone."""
    return Client(
        environment="frameworks",
        script=script,
        entry=entry,
        sends=frozenset(sends),
        shows=frozenset(),
        hosted=True,
        default_instruction=HOSTED_INSTRUCTION,
        errors="hidden",
    )


def other(environment: str, script: str, entry: str = "", **options: Any) -> Client:
    """A client of another vendor's API, or a framework on one."""
    names = {"sends": {"model", "top_n"}, "shows": set(), **options}
    sets = {name: frozenset(names.pop(name)) for name in ("sends", "shows")}
    return Client(environment=environment, script=script, entry=entry, **sets, **names)


def litellm(entry: str, **options: Any) -> Client:
    options = {"sends": {"model", "top_n", "return_documents"}, "raises": STAINLESS, **options}
    return other("sdks", "litellm_rerank.py", entry, **options)


COHERE = {"a wrong key": "UnauthorizedError", "a blank query": "BadRequestError"}
VOYAGE = {"a wrong key": "AuthenticationError", "a blank query": "InvalidRequestError"}
STAINLESS = {"a wrong key": "AuthenticationError", "a blank query": "BadRequestError"}
API_CALL = {"a wrong key": "APICallError", "a blank query": "APICallError"}
RUNTIME = {"a wrong key": "RuntimeError", "a blank query": "RuntimeError"}
BEDROCK = {"a wrong key": "AccessDeniedException", "a blank query": "ValidationException"}
ALL_SHOWN = {"total_tokens", "request_id"}

CLIENTS = [
    dashscope("frameworks", "TextReRank.call", "returned"),
    dashscope("frameworks", "AioTextReRank.call", "returned"),
    dashscope("frameworks", "Client", "raised"),
    dashscope("frameworks", "AsyncClient", "raised"),
    Client(
        environment="frameworks",
        script="dashscope_cli.py",
        shows=frozenset({"total_tokens"}),
        hosted=True,
        default_instruction=HOSTED_INSTRUCTION,
        errors="printed",
    ),
    dashscope("dashscope-1.25", "TextReRank.call", "returned"),
    dashscope("dashscope-1.25", "AioTextReRank.call", "returned"),
    dashscope("dashscope-1.20", "TextReRank.call", "returned"),
    framework("langchain_community_rerank.py", "top_n"),  # by its constructor: always sends gte-rerank
    framework("langchain_community_rerank.py", "top_n", "model", entry="named"),
    framework("llama_index_rerank.py", "top_n", "model"),
    Client(environment="sdks", script="openai_sdk.py", hosted=True, default_instruction=HOSTED_INSTRUCTION),
    other("sdks", "cohere_sdk.py", "ClientV2", shows=ALL_SHOWN, raises=COHERE),
    other("sdks", "cohere_sdk.py", "AsyncClientV2", shows=ALL_SHOWN, raises=COHERE),
    other(
        "sdks",
        "cohere_sdk.py",
        "Client",
        sends={"model", "top_n", "return_documents"},
        shows=ALL_SHOWN,
        raises=COHERE,
    ),
    other("sdks", "voyage_sdk.py", "Client", shows={"total_tokens"}, raises=VOYAGE),
    other("sdks", "voyage_sdk.py", "AsyncClient", shows={"total_tokens"}, raises=VOYAGE),
    other(
        "sdks",
        "mixedbread_sdk.py",
        sends={"model", "top_n", "return_documents"},
        shows={"total_tokens"},
        raises=STAINLESS,
    ),
    litellm("dashscope /compatible-api/v1", default_instruction=HOSTED_INSTRUCTION, shows_words=False),
    litellm("cohere", sends={"model", "top_n"}),
    litellm("jina_ai"),
    litellm("hosted_vllm"),
    litellm("hosted_vllm /v1"),
    litellm("huggingface"),
    litellm("voyage"),
    litellm("infinity", server="open", raises={"a blank query": "BadRequestError"}),  # fails if documents are objects
    litellm("litellm_proxy"),
    litellm("deepinfra /v1", sends={"model"}, raises={"a wrong key": "AuthenticationError"}),  # its field is queries
    litellm("nvidia_nim", shows_log_odds=True, raises=dict.fromkeys(STAINLESS, "BadRequestError")),
    litellm("nvidia_nim/ranking", shows_log_odds=True, raises=dict.fromkeys(STAINLESS, "BadRequestError")),
    litellm("bedrock", sends={"model", "top_n"}),
    other(
        "sdks",
        "boto3_sdk.py",
        "bedrock-agent-runtime rerank",
        sends={"model", "top_n", "instruct"},
        sends_empty_texts=False,
        raises=BEDROCK,
    ),
    other(
        "sdks",
        "boto3_sdk.py",
        "bedrock-runtime invoke_model",
        sends={"model", "top_n", "return_documents", "instruct"},
        raises=BEDROCK,
    ),
    other("frameworks", "llama_index_others.py", "CohereRerank", raises=COHERE),
    other("frameworks", "llama_index_others.py", "JinaRerank", raises=RUNTIME),
    other("frameworks", "llama_index_others.py", "TextEmbeddingInference", errors="hidden"),
    other(
        "frameworks", "llama_index_others.py", "XinferenceRerank", server="open", raises={"a blank query": "Exception"}
    ),
    other("frameworks", "llama_index_others.py", "SiliconFlowRerank", raises=RUNTIME),
    other("frameworks", "langchain_partners.py", "CohereRerank", raises=COHERE),
    other("frameworks", "langchain_partners.py", "VoyageAIRerank", raises=VOYAGE),
    other(
        "frameworks",
        "langchain_partners.py",
        "NVIDIARerank",
        shows_log_odds=True,
        raises={"a wrong key": "Exception", "a blank query": "Exception"},
    ),
    other("frameworks", "haystack_rankers.py", "CohereRanker", raises=COHERE),
    other(
        "frameworks",
        "haystack_rankers.py",
        "NvidiaRanker",
        shows_log_odds=True,
        raises={"a wrong key": "ValueError", "a blank query": "ValueError"},
    ),
    other(
        "frameworks",
        "xinference_sdk.py",
        sends={"model", "top_n", "return_documents", "instruct"},
        shows=ALL_SHOWN,
        raises=RUNTIME,
    ),
    other(
        "node",
        "ai_sdk.mjs",
        "qwen-ai-provider-v5",
        default_instruction=HOSTED_INSTRUCTION,
        shows_words=False,  # shows the HTTP reason phrase
        raises={**API_CALL, "an unknown model": "APICallError"},
    ),
    other("node", "ai_sdk.mjs", "@ai-sdk/amazon-bedrock", raises=API_CALL),
    other("node", "ai_sdk.mjs", "@ai-sdk/cohere", raises=API_CALL),
    other("node", "ai_sdk.mjs", "@ai-sdk/togetherai", raises=API_CALL),
    other("node", "ai_sdk.mjs", "gateway", raises={"a blank query": "GatewayInvalidRequestError"}),
    other("node", "ai_sdk.mjs", "cohere-ai", shows=ALL_SHOWN, raises=COHERE),
    other(  # without top_k its request is like Jina's
        "node",
        "ai_sdk.mjs",
        "voyageai",
        sends={"model"},
        shows={"total_tokens"},
        raises=dict.fromkeys(COHERE, "VoyageAIError"),
    ),
    other(
        "more-sdks",
        "infinity_mixedbread_tei.py",
        "infinity-client",
        sends={"model", "top_n", "return_documents"},
        shows=ALL_SHOWN,
        raises=dict.fromkeys(COHERE, "UnexpectedStatus"),
    ),
    other(
        "more-sdks",
        "infinity_mixedbread_tei.py",
        "mixedbread-ai",
        sends={"model", "top_n", "return_documents"},
        shows={"total_tokens"},
        raises=COHERE,
    ),
    other("more-sdks", "infinity_mixedbread_tei.py", "tei-client", sends={"return_documents"}, errors="hidden"),
    other(
        "more-sdks",
        "pinecone_zeroentropy.py",
        "pinecone",
        sends={"model", "top_n", "return_documents"},
        raises={"a wrong key": "UnauthorizedError"},  # it refuses a blank query itself
    ),
    other(
        "node",
        "pinecone_zeroentropy.mjs",
        "@pinecone-database/pinecone",
        sends={"model", "top_n", "return_documents"},
        raises={"a blank query": "PineconeBadRequestError"},  # after a wrong key it shows a text of its own
    ),
    other("more-sdks", "pinecone_zeroentropy.py", "zeroentropy", shows={"total_tokens"}, raises=STAINLESS),
    other("node", "pinecone_zeroentropy.mjs", "zeroentropy", shows={"total_tokens"}, raises=STAINLESS),
    other("more-sdks", "pinecone_zeroentropy.py", "isaacus", shows={"total_tokens"}, raises=STAINLESS),
]
