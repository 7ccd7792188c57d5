"""Where the samples that are measured come from."""
