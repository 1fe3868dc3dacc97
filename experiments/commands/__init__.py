"""What a researcher types: the one command `privet` and its sub-commands."""
