"""Whether privet computes rightly on a GPU, and how fast: random models, no downloads."""
