"""One answer of several choices: from tokens to JSON and server-sent events."""
