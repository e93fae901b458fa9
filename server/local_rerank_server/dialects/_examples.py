"""The example request of all dialects, for OpenAPI and the golden files."""

from __future__ import annotations

QUERY = "What is a text reranking model?"
DOCUMENTS = [
    "Text reranking models are widely used in search engines and recommender systems to sort candidates by relevance.",
    "Quantum computing is a frontier field of computer science.",
    "The rise of pretrained language models has brought new advances to text reranking.",
]
