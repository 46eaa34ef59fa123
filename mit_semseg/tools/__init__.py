"""Commands for recipes: overfit, profile, sweep and compare."""
