"""Probes, retrieval metrics and the listening test."""
