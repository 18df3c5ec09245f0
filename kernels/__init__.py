"""CUDA kernels for the hot paths: one pair of files each, X.cu (CUDA C) and X.py (checks, sizes, launch)."""
