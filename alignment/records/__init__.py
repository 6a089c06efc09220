"""The files that cross from worker to driver or report, each as one typed record that both sides use.

No module here needs torch, Hydra or numpy. docs/design/0001 shows the files.
"""
