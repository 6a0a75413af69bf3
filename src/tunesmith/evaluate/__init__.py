"""Did it get better? Metrics, intervals, report."""
