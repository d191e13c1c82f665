"""The folder that a trained encoder is shipped in."""
