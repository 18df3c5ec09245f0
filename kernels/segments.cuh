// Where the operands of attention lie, and which queries see which keys: attention.py makes these tables.

// The numbers of token t, head h of an operand begin at offset + t token + h head: three integers for each operand.
enum { Q, K, V, O, DO, DQ, DK, DV };

__device__ __forceinline__ size_t at(const int* __restrict__ places, int operand, int token, int head) {
    return places[3 * operand] + (size_t)token * places[3 * operand + 1] + (size_t)head * places[3 * operand + 2];
}

struct Segment {
    int query, queries;         // the token of the first query, and the number of queries
    int key, keys;              // the same for its own keys
    int diagonal;               // query i sees own key j if j <= i + diagonal
    int prefix, prefix_keys;    // the same for the prefix, which every query sees
};

__device__ __forceinline__ Segment segment_of(const int* __restrict__ segments, int i) {
    const int* s = segments + 7 * i;
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}
