"""The verdict: paired differences, their bounds, temperatures, and the samples that changed."""
