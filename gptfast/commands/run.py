"""Commands that run a model: generate, score, evaluate."""
