"""What two processes say to each other, and the links it goes over."""
