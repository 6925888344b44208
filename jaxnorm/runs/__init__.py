"""Trains to disk, resumes what was cut off, on one host or many."""
