"""One worker process: engine and model thread, registration with the router, the attempts that it serves."""
