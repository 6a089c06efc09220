"""A package that brings a kind of stage, as somebody else would write it (alignment/stages/README.md)."""
