"""What a run says of itself: metrics, console, token records, curves, the report."""
