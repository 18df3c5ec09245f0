// Puzzle 1, a reduction: y[r] is the sum of row r of x (rows, columns).
//
// A block of 128 threads has one row, blockIdx.x. Each thread adds up numbers t, t + 128, .. of it; the 128 sums are
// then added in shared memory. A tree takes 7 steps: 64 threads add, then 32, 16, .. 1. (One thread that adds them all
// is right, too, but takes 127 steps.) Each number of x is read once. Not allowed: atomics. The emulator needs one
// __shared__ array in a declaration. Think of: where must all threads wait for each other, and what if columns is 5?

extern "C" __global__ void __launch_bounds__(128)
sums(const float* x, float* y, int rows, int columns) {
    // YOUR CODE HERE
}
