"""The plane that streams units over UCX."""
