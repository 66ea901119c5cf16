"""The plane that maps a same-host peer's pools and copies from them."""
