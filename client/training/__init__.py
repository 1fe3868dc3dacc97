"""Local training on own records: what is drawn, learnt and kept at home."""
