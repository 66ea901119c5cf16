"""Workers register here; requests are placed, tried again, and their tokens passed on."""
