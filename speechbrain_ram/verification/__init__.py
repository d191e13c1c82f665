"""From a trial list to a report."""
