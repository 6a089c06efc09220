"""What curves, samples and results are sent to beside the files: one tracker a file."""
