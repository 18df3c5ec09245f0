// Puzzle 2, online softmax: y[r][j] = exp(x[r][j]) / sum over i of exp(x[r][i]), for x and y (rows, columns).
//
// The numbers reach 1000, and exp(1000) is infinite: subtract the largest number m of the row first. Each number of x
// may be read twice only: so m and the sum d of exp(x - m) come from one pass. With a new number x,
//     m' = max(m, x),  d' = d exp(m - m') + exp(x - m')               Milakov and Gimelshein 2018, arXiv:1805.02867
// and two pairs (m, d) are joined by the same rule. A block is one warp, 32 threads, and has one row, blockIdx.x.
// __shfl_xor_sync(0xffffffff, value, n) is the value of the thread whose number differs in bit n. A number may be
// -INFINITY (a masked token); at least one of a row is not. Write -INFINITY as __int_as_float(0xff800000).

extern "C" __global__ void __launch_bounds__(32)
softmax(const float* x, float* y, int rows, int columns) {
    // YOUR CODE HERE
}
