"""A run on disk: every record typed, written atomically, and checked when it is read."""
