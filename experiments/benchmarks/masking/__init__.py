"""What masking costs: in a simulated round, for each party, and beside Flower's own."""
