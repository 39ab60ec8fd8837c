"""The command line: the only room that prints, colours or exits."""
