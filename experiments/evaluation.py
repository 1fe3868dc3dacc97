def evaluate(folder, config): return {}
