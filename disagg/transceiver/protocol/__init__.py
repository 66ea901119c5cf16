"""One transfer as a state machine. Pure: no clock, socket, thread, tensor or await."""
