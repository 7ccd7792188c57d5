"""Run a user's network without leaving a trace on it, and analyse its outputs and graph."""
