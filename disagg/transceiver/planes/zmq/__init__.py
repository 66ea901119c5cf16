"""The plane that carries units in ZeroMQ messages, under CURVE where there is a secret."""
