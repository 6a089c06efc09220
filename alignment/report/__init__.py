"""A run or a sweep as one HTML file: reads its files, draws, writes. It never imports torch and needs no network."""
