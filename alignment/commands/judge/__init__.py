"""``align judge``: people say which of two answers is better."""
