"""Nets trained in memory: pure functions, arrays in and arrays out. Nothing here touches a disk."""
