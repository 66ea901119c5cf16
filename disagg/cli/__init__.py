"""The command line: options, supervision of child processes, what is printed."""
