"""What a name on the command line stands for, and loading it."""
