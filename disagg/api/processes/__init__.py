"""API processes: HTTP, text and tokens in processes of their own behind one listening socket, the router in another."""
