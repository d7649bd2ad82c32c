"""What is told to Weights & Biases."""
