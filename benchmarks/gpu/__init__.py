"""Correctness and cost on one GPU, in eight minutes, with nothing to install or download."""
