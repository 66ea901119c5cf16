"""What a request asks for: the table of fields, their checks, and what follows from several together."""
