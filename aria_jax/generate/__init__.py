"""Continuing a performance: cache, sampling, grammar."""
