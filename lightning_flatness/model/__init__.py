"""Running somebody's network without leaving a trace, and what can be read off it."""
