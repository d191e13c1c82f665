"""Training: the Brain, and what a run is."""
