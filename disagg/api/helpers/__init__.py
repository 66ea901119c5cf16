"""Processes that read large bodies beside the event loop."""
