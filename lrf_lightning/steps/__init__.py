"""How a loss is made up of its samples and terms, and where the steps of a LightningModule show it."""
