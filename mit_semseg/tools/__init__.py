"""Commands about recipes: can it learn (overfit), what does it cost (profile), many (sweep)."""
