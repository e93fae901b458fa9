// Generates the code that sends a request, for each client; matches docs/clients.md.

/** One row per client: its name and `code(request, base, key)`; `key` is "" if the server needs none. */
export const CLIENTS = [
  { name: "curl", code: curl },
  { name: "DashScope", code: dashscope },
  { name: "OpenAI", code: openai },
  { name: "Cohere", code: cohere },
  { name: "LiteLLM", code: litellm },
  { name: "Voyage AI", code: voyage },
  { name: "LangChain", code: langchain },
  { name: "LlamaIndex", code: llamaIndex },
];

/** The client's code, and for an SDK how to get chunks, for which its API has no field. */
export function codeOf(client, request, base, key) {
  const hint = "# Long documents in chunks: local-rerank serve --long-documents chunk\n";
  return (request.long_documents && client.code !== curl ? hint : "") + client.code(request, base, key);
}

const PRINT = (results) => `
for result in ${results}:
    print(result.index, result.relevance_score)
`;

function curl(request, base, key) {
  const body = JSON.stringify(request, null, 2);
  const header = key ? ` \\\n  -H 'Authorization: Bearer ${key}'` : "";
  return `curl ${base}/v1/local/rank \\
  -H 'Content-Type: application/json'${header} \\
  -d '${body.replaceAll("'", "'\\''")}'
`;
}

function dashscope({ query, documents, instruction, top_n, model }, base, key) {
  return `import dashscope

dashscope.base_http_api_url = ${python(`${base}/api/v1`)}

response = dashscope.TextReRank.call(
${named({ model, query, documents, top_n, instruct: instruction, api_key: key || "any" })})
${PRINT("response.output.results")}`;
}

function openai({ query, documents, instruction, top_n, model }, base, key) {
  return `from openai import OpenAI

client = OpenAI(api_key=${python(key || "any")}, base_url=${python(`${base}/compatible-api/v1`)})

body = ${python(defined({ model, query, documents, top_n, instruct: instruction }))}
for result in client.post("/reranks", body=body, cast_to=object)["results"]:
    print(result["index"], result["relevance_score"])
`;
}

function cohere({ query, documents, instruction, top_n, model }, base, key) {
  const request_options = instruction && { additional_body_parameters: { instruction } };
  return `import cohere

client = cohere.ClientV2(api_key=${python(key || "any")}, base_url=${python(base)})

response = client.rerank(
${named({ model, query, documents, top_n, request_options })})
${PRINT("response.results")}`;
}

function litellm({ query, documents, instruction, top_n, model }, base, key) {
  return `import litellm
${withoutInstruction("LiteLLM", instruction)}
response = litellm.rerank(
${named({
    model: `dashscope/${model}`, query, documents, top_n, api_base: `${base}/compatible-api/v1`, api_key: key || "any",
  })})
for result in response.results:
    print(result["index"], result["relevance_score"])
`;
}

function voyage({ query, documents, instruction, top_n, model }, base, key) {
  return `import voyageai

client = voyageai.Client(api_key=${python(key || "any")}, base_url=${python(`${base}/v1`)})
${withoutInstruction("Voyage AI", instruction, "instruction")}
response = client.rerank(
${named({ query, documents, model, top_k: top_n })})
${PRINT("response.results")}`;
}

function langchain({ query, documents, instruction, top_n, model }, base, key) {
  const options = named({ dashscope_api_key: key || "any", top_n: top_n ?? documents.length });
  return `import dashscope
from langchain_community.document_compressors import DashScopeRerank
from langchain_core.documents import Document

dashscope.base_http_api_url = ${python(`${base}/api/v1`)}
${withoutInstruction("LangChain", instruction)}
texts = ${python(documents)}
documents = [Document(text, metadata={"index": index}) for index, text in enumerate(texts)]
reranker = DashScopeRerank(
${options})
reranker.model = ${python(model)}  # the constructor does not take it
for document in reranker.compress_documents(documents, ${python(query)}):
    print(document.metadata["index"], document.metadata["relevance_score"])
`;
}

function llamaIndex({ query, documents, instruction, top_n, model }, base, key) {
  const options = named({ model, api_key: key || "any", top_n: top_n ?? documents.length });
  return `import dashscope
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.dashscope_rerank import DashScopeRerank

dashscope.base_http_api_url = ${python(`${base}/api/v1`)}
${withoutInstruction("LlamaIndex", instruction)}
texts = ${python(documents)}
nodes = [NodeWithScore(node=TextNode(id_=str(index), text=text)) for index, text in enumerate(texts)]
reranker = DashScopeRerank(
${options})
for node in reranker.postprocess_nodes(nodes, query_str=${python(query)}):
    print(node.node.node_id, node.score)
`;
}

const withoutInstruction = (client, instruction, option = "dashscope-instruction") => (instruction
  ? `\n# ${client} cannot send an instruction; set the server's default: local-rerank serve --${option} "..."\n`
  : "");

/** Keyword arguments, one per line; undefined values are omitted. */
const named = (values) =>
  Object.entries(defined(values)).map(([name, value]) => `    ${name}=${python(value, "    ")},\n`).join("");

const defined = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));

/** A JSON value as a Python literal; a JSON string is a Python literal already. */
function python(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const items = Array.isArray(value)
    ? value.map((item) => python(item, `${indent}    `))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, `${indent}    `)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return items.length ? `${open}\n${items.map((item) => `${indent}    ${item},\n`).join("")}${indent}${close}` : open + close;
}
