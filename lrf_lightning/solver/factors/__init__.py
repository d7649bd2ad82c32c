"""Low-rank factors: components in a metric, orders of a convolution, and the fit to what layers will see."""
