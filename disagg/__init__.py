"""Disaggregated prefill/decode serving whose KV transfer moves only what is needed."""

__version__ = "0.1.0"
