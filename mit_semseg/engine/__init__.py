"""Training, evaluation and prediction, as the commands use them."""
