"""The optimizers, and the choice of an algorithm for each parameter."""
