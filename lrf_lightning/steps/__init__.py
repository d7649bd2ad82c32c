"""The loss of a LightningModule, taken from its own steps, for single samples where they tell."""
