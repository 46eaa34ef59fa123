"""What the commands do: train, evaluate, predict; each module one job."""
