"""The engine of the project: continuous batching over a paged KV cache, with transformers' own model classes."""
