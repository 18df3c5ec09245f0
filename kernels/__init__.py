"""CUDA kernels for the hot paths. Each module is a pair of files: X.cu (CUDA C) and X.py (checks, sizes, launches)."""
