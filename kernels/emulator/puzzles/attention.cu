// Puzzle 3, FlashAttention for a tile of queries: o = softmax(q k^T / sqrt(32)) v, for one head without a mask.
//
// q and o are (queries, 32), k and v are (keys, 32). A block has 32 queries, from 32 blockIdx.x on, and 32 threads: one
// thread for each query, with its row of q and of o in registers. The scores of all keys do not fit: load tiles of 32
// keys and values into shared memory, and update m, d (puzzle 2) and o for each tile; o shrinks by exp(m - m') too.
// A block may read each number of k and v once. Think of: a last tile with fewer than 32 keys, threads without a query
// (they must still load, and still wait), and the barriers before and after a tile is used. The emulator needs one
// __shared__ array in a declaration.

extern "C" __global__ void __launch_bounds__(32)
attention(const float* q, const float* k, const float* v, float* o, int queries, int keys) {
    // YOUR CODE HERE
}
