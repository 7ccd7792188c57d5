"""Measurements of cost (``python -m benchmarks``) and of coverage (``python -m benchmarks.coverage``)."""
