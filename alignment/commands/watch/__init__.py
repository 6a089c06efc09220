"""``align watch``: the report of a run as a page that follows it."""
