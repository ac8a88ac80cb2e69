"""Studies: a question, equally tuned arms, several seeds, a verdict from the numbers, a page."""
