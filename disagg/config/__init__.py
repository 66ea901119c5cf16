"""Settings, secret and resources of a process. Imports neither torch nor transformers."""
