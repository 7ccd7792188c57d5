"""The user's network as a whole: run it without changing it, analyse its outputs and graph, move its weights."""
