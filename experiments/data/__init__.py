"""Who takes part and what they wrote."""
