// The SDKs of Pinecone and ZeroEntropy for Node.
// Jobs come in and answers go out as in answering.py; the form of both stands in tests/clients/driver.py.

import { Pinecone } from "@pinecone-database/pinecone";
import { readFileSync, writeSync } from "node:fs";
import ZeroEntropy from "zeroentropy";

const sdks = {
  async "@pinecone-database/pinecone"(job) {
    const { model, query, documents, top_n, return_documents } = job.request;
    const client = new Pinecone({ apiKey: job.api_key, controllerHostUrl: job.base_url });
    const response = await client.inference.rerank({
      model,
      query,
      documents: documents.map((text) => ({ text })),
      rankFields: ["text"], // without it the SDK refuses an empty document
      topN: top_n,
      returnDocuments: return_documents ?? false,
    });
    return {
      results: response.data.map(({ index, score, document }) => ({
        index,
        relevance_score: score,
        text: document?.text,
      })),
    };
  },
  async zeroentropy(job) {
    const client = new ZeroEntropy({ apiKey: job.api_key, baseURL: `${job.base_url}/v1`, maxRetries: 0 });
    const { results, total_tokens } = await client.models.rerank(job.request);
    return { results, total_tokens };
  },
};

const answers = [];
for (const job of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    answers.push(await sdks[job.entry](job));
  } catch (error) {
    answers.push({ error: { type: error.constructor.name, message: error.message, status_code: error.status } });
  }
}
writeSync(1, JSON.stringify(answers));
