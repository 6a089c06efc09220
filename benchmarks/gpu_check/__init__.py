"""The first minutes on a GPU: does everything run there, and how fast. ``make gpu-check`` calls it."""
