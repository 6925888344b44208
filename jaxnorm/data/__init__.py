"""A dataset's name becomes uint8 arrays in memory, checked and cached. Knows nothing of JAX."""
