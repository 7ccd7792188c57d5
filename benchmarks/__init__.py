"""Measure what the package costs (``python -m benchmarks``) and which models it covers (``benchmarks.coverage``)."""
