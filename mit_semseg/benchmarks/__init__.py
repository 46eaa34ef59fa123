"""What `mit-semseg bench` measures: the published procedure and ours, taking turns."""
