"""The operators in the form that XLA runs fast on a CPU, with the values of Flax's own."""
