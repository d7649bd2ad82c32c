"""Running a model on batches: losses and scores per sample, what layers see meanwhile, and paused passes."""
