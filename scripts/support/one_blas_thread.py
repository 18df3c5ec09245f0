"""Import this before NumPy, which reads these variables: one thread for BLAS.

Each worker process has its own part of a batch (minilm/stages/train_state.py). With a thread for each core in each
worker, the threads would wait for each other.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[variable] = "1"
