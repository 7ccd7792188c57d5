"""The user's network as a whole: run it without leaving a trace, analyse its outputs and graph, move its weights."""
