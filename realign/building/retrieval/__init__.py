"""Retrieval of similar images of a corpus: embeddings, their store, search, and exclusions."""
