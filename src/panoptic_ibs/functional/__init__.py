"""Pure tensor functions: losses, point sampling, mask fusion, joint histograms."""
