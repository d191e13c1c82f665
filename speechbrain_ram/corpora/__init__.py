"""From a corpus on disk to a manifest and trial lists."""
