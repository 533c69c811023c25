"""The decoder and its heads."""
