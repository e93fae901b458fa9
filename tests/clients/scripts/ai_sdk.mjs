// The Vercel AI SDK with the providers of Amazon Bedrock, Qwen, Cohere and Together AI and with its gateway, and the SDKs of
// Cohere and Voyage for Node. Jobs come in and answers go out as in answering.py; driver.py has the form of both.

import { createAmazonBedrock } from "@ai-sdk/amazon-bedrock";
import { createCohere } from "@ai-sdk/cohere";
import { createTogetherAI } from "@ai-sdk/togetherai";
import { createGateway, rerank } from "ai";
import { CohereClientV2 } from "cohere-ai";
import { readFileSync, writeSync } from "node:fs";
import { createQwen } from "qwen-ai-provider-v5";
import { VoyageAIClient } from "voyageai";

const providers = {
  "qwen-ai-provider-v5": ({ base_url, api_key }) =>
    createQwen({ apiKey: api_key, baseURL: `${base_url}/compatible-mode/v1` }),
  "@ai-sdk/amazon-bedrock": ({ base_url, api_key }) =>
    createAmazonBedrock({ apiKey: api_key, baseURL: base_url, region: "us-east-1" }),
  "@ai-sdk/cohere": ({ base_url, api_key }) => createCohere({ apiKey: api_key, baseURL: `${base_url}/v2` }),
  "@ai-sdk/togetherai": ({ base_url, api_key }) => createTogetherAI({ apiKey: api_key, baseURL: `${base_url}/v1` }),
  gateway: ({ base_url, api_key }) => createGateway({ apiKey: api_key, baseURL: `${base_url}/v3/ai` }),
};

async function withAiSdk(job) {
  const { model, query, documents, top_n } = job.request;
  const { ranking } = await rerank({
    model: providers[job.entry](job).rerankingModel(model),
    query,
    documents,
    maxRetries: 0,
    ...(top_n === undefined ? {} : { topN: top_n }),
  });
  return {
    results: ranking.map(({ originalIndex, score, document }) => ({
      index: originalIndex,
      relevance_score: score,
      text: document,
    })),
  };
}

async function withCohere(job) {
  const { model, query, documents, top_n } = job.request;
  const client = new CohereClientV2({ token: job.api_key, environment: job.base_url });
  const response = await client.rerank({ model, query, documents, topN: top_n });
  return {
    results: response.results.map(({ index, relevanceScore }) => ({ index, relevance_score: relevanceScore })),
    total_tokens: response.meta.tokens.inputTokens,
    request_id: response.id,
  };
}

async function withVoyage(job) {
  const { model, query, documents, top_n } = job.request;
  const client = new VoyageAIClient({ apiKey: job.api_key, baseUrl: `${job.base_url}/v1`, maxRetries: 0 });
  const { data, usage } = await client.rerank({ model, query, documents, topK: top_n });
  return {
    results: data.map(({ index, relevanceScore }) => ({ index, relevance_score: relevanceScore })),
    total_tokens: usage.totalTokens,
  };
}

const sdks = { "cohere-ai": withCohere, voyageai: withVoyage };

async function answer(job) {
  try {
    return await (sdks[job.entry] ?? withAiSdk)(job);
  } catch (error) {
    return {
      error: {
        type: error.constructor.name,
        message: error.message,
        status_code: error.statusCode,
      },
    };
  }
}

const answers = [];
for (const job of JSON.parse(readFileSync(0, "utf8"))) answers.push(await answer(job));
writeSync(1, JSON.stringify(answers));
