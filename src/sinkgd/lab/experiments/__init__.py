"""Studies: each compares several ways to train, its arms, and gives a verdict and a page."""
