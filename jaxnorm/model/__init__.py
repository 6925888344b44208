"""The net: plain Flax to read, fast operators underneath. Knows nothing of training."""
