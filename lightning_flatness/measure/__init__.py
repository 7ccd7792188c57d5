"""Measurements in plain PyTorch: flatness, largest eigenvalues, spectrum, landscape."""
