"""Fused operations, one implementation per backend."""
