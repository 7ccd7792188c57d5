"""Measurements of cost (``python -m benchmarks``) and of coverage (``benchmarks/coverage.py``)."""
