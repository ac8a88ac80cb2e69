"""Updates of sharded matrices: ranks exchange vectors, never matrices."""
