"""Studies: each has a question, equally tuned arms, several seeds, a verdict and a page."""
