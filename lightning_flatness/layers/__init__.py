"""Layers: recording them in a forward pass, certifying how they can be measured, and computing block traces."""
