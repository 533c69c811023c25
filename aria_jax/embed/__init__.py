"""Embeddings of many files, and search among them."""
