"""Tests, one file a module, named by what they claim."""
