"""The plane that streams units over TCP."""
