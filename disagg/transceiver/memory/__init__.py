"""Bytes of pools: gathered, converted, copied, hashed."""
