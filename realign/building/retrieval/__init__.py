"""Which images of a corpus look alike: embeddings, their store, search, and what is left out."""
