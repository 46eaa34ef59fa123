"""The demo: rendered street scenes with exact labels, and a report of a trained model."""
