"""Certificates, in the order of docs/theory.md: each compares two ways to the same number.

What they raise or return says why a certificate fails and names no layer; the caller knows it and adds it.
"""

# The largest relative difference allowed between the two ways, in rounding errors of the precision.
ROUNDINGS = 1e3
