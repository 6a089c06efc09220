"""Speed, memory and use of the hardware beside other ways of doing the same work (benchmarks/README.md)."""
