"""Made-up records need not survive a power cut: waiting for the disk takes most of their time."""

import os

import pytest


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
