"""The sources of the samples that a callback measures."""
