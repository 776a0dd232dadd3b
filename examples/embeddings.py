"""Embeddings of several texts in one decode, and how similar they are.

A context with `embeddings=True` gives a vector for each token. Models that are made for embeddings
pool them by themselves: leave `pooling_type` out and read `context.embeddings_seq(seq_id)`.
"""

import numpy as np

from pyllamabatch import Batch, Context, Model

texts = ["count the letters", "count the letter", "What is 17 + 25?"]

with Model.default() as model:
    prompts = [model.vocab.tokenize(text) for text in texts]
    n_seq_max = len(texts)
    with Context(
        model, n_ctx=256 * n_seq_max, n_seq_max=n_seq_max, embeddings=True, pooling_type="none"
    ) as context:
        batch = Batch(sum(map(len, prompts)))
        for seq_id, prompt in enumerate(prompts):
            batch.extend(prompt, 0, seq_id, logits=True)  # a vector for each of its tokens
        context.decode(batch)  # all texts at once
        rows = np.split(context.embeddings_all(), np.cumsum([len(p) for p in prompts])[:-1])
        vectors = np.array([row.mean(axis=0) for row in rows])  # mean pooling

vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
for text, row in zip(texts, vectors @ vectors.T, strict=True):
    print(f"{text:20}", " ".join(f"{similarity:6.3f}" for similarity in row))
