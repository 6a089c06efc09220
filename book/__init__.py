"""The book: what of docs/ is generated from the code, and how mkdocs builds a site of the rest. ``python -m book``
writes docs/reference (``make reference``), and a test compares it with the code. mkdocs calls ``book/hooks.py`` (``make
docs``). Nothing in the package imports this."""
