"""Studies: a question, arms tuned alike, seeds, a verdict from the numbers, and a page."""
