"""What surrounds a training run: command line, metrics, progress, trackers, provenance."""
