"""Decode steps as captured graphs."""
