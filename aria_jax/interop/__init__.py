"""Weights to and from the published PyTorch checkpoints."""
