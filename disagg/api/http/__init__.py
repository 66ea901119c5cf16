"""Connections, bodies, keys, errors and responses, whatever the endpoint."""
