"""The parallel room: synchronised batch normalisation and replicas. Needs torch and numpy only."""
