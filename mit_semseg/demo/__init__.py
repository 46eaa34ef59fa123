"""The demo: rendered street scenes with exact labels, and a page about a trained model."""
