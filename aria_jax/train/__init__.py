"""One loop, four tasks."""
