"""Local training on a person's own records: what is drawn, learnt and kept at home."""
