"""What the owner allows, what a run asks for, and the recorded yes."""
