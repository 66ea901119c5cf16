"""The OpenAI-compatible HTTP API: fields checked, text to tokens and back, answers as JSON or server-sent events."""
