"""Check correctness and measure cost on one GPU, in about eight minutes and without downloads."""
