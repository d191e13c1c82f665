"""Recordings, manifests and what training reads of them."""
