"""The fused primitives of a transformer, forward and backward by hand.

One node of the graph each, so that training spends its time in a few large operations.
`plain.py` says the same plainly, from elementary operations; the tests hold the two
together. Shapes: B batch, T tokens, V vocabulary, D width, H query heads, G key/value
heads (G divides H), K head width, F hidden width of the feed-forward.
On a GPU they are CUDA kernels (kernels/), which refuse what they do not serve; kernel=False takes these.
"""

from minilm import ops
from minilm.backend import array_module, is_cupy
from minilm.kernels import decode, layers as on_gpu
from minilm.tensor import DeferredMatmul, primitive

# Logits that token_log_probs holds at a time: 2^25 are 128 MB in float32.
LOGITS_HELD = 1 << 25
# Numbers that stay in the cache of one core from one operation to the next.
IN_CACHE = 1 << 18
# Queries that attention takes at a time, and scores of a call that it keeps for backward.
QUERIES = 64
SCORES_KEPT = 1 << 22


@primitive
def rms_norm(x, weight, eps=1e-6, kernel=True):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis.  (..,D), (D,) -> (..,D)

    Zhang and Sennrich 2019, arXiv:1910.07467. With n = x r the normalised input, r the
    reciprocal root, and dn = dy weight:  dx = r (dn - n mean(dn n)), the second term because
    dr/dx = -r^3 x / D.
    """
    if kernel and is_cupy(x):
        return on_gpu.rms_norm(x, weight, eps)
    xp = array_module(x)
    D = x.shape[-1]
    r = 1 / xp.sqrt(_dot_rows(x, x) / D + eps)
    n = x * r
    def vjp(dy):
        dn, dweight = dy * weight, xp.einsum("nd,nd->d", dy.reshape(-1, D), n.reshape(-1, D))
        dx = n * (_dot_rows(dn, n) / -D)
        dx += dn
        dx *= r
        return dx, dweight
    return n * weight, vjp


def _dot_rows(a, b):
    """sum(a * b) over the last axis, which is kept; no product is formed in memory."""
    return (a[..., None, :] @ b[..., :, None])[..., 0]


@primitive
def swiglu(gate_up, kernel=True):
    """silu(gate) * up, with gate and up the two halves of the last axis.  (..,2F) -> (..,F)

    Shazeer 2020, arXiv:2002.05202. silu(g) = g s with s = sigmoid(g), and silu'(g) = s + silu(g) (1 - s).
    Computed as 1/2 + tanh(g/2) / 2, s is right to 1e-7 in float32, which below g = -17 leaves it no digit.
    """
    if kernel and is_cupy(gate_up):
        return on_gpu.swiglu(gate_up)
    xp = array_module(gate_up)
    width = gate_up.shape[-1] // 2
    if gate_up.shape[-1] % 2:
        raise ValueError("the last axis holds gate and up side by side; its length must be even")
    gate, up = gate_up[..., :width], gate_up[..., width:]
    s = xp.multiply(gate, 0.5)                 # the sigmoid, without branches: 1/2 + tanh(gate/2) / 2
    xp.tanh(s, out=s)
    s *= 0.5
    s += 0.5
    def vjp(dy):
        dx = xp.empty_like(gate_up)
        dgate, dup = dx[..., :width], dx[..., width:]
        ds = dy * s
        xp.multiply(ds, gate, out=dup)         # dy silu(gate)
        xp.subtract(1, s, out=dgate)
        dgate *= dup
        dgate += ds
        dgate *= up
        return dx
    y = gate * s
    y *= up
    return y, vjp


def rope_tables(positions, head_width, base=10000.0, dtype="float32"):
    """cos and sin, each positions.shape + (K/2,), of position * base^(-2i/K) for pair i.

    Computed in float64 and rounded once: at position 8192 a float32 angle is off by 5e-4.
    """
    if head_width % 2:
        raise ValueError(f"rotary positions rotate pairs: the head width {head_width} must be even")
    xp = array_module(positions)
    frequencies = base ** (-xp.arange(0, head_width, 2, dtype="float64") / head_width)
    angles = positions[..., None] * frequencies
    return xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)


@primitive
def rope(x, cos, sin, pairing="half"):
    """Rotate pair i of each head by the angle of its position.  x (B,H,T,K); cos, sin (T,K/2)

    Su et al. 2021, arXiv:2104.09864. Two pairings are in use, and weights trained with one
    are wrong with the other: "half" pairs (i, i + K/2) (GPT-NeoX, Llama in Hugging Face
    form), "interleaved" pairs (2i, 2i + 1) (the paper, Meta's Llama, GGUF). Tables may also
    be (B,1,T,K/2). A rotation is orthogonal: the vjp rotates back.
    """
    xp = array_module(x, cos, sin)
    if cos.dtype != x.dtype:
        raise TypeError(f"mixed dtypes: x is {x.dtype} and its tables are {cos.dtype}; make them with dtype={x.dtype}")
    turn = cos + 1j * sin                   # exp(i angle)
    def vjp(dy):
        return rotate(dy, turn.conj(), pairing)
    return rotate(x, turn, pairing), vjp


def rotate(x, turn, pairing="half"):
    """The pairs of x (..,K) as complex numbers, times turn (..,K/2), and back: an array like x."""
    xp, (first, second) = array_module(x), pair_slices(x.shape[-1], pairing)
    z, rotated = xp.empty((*x.shape[:-1], x.shape[-1] // 2), turn.dtype), xp.empty(x.shape, x.dtype)
    z.real, z.imag = x[..., first], x[..., second]
    z *= turn
    rotated[..., first], rotated[..., second] = z.real, z.imag
    return rotated


def pair_slices(width, pairing):
    """Where the first and where the second numbers of all pairs stand in a head of that width."""
    if pairing == "half":
        return slice(0, width // 2), slice(width // 2, None)
    if pairing == "interleaved":
        return slice(0, None, 2), slice(1, None, 2)
    raise ValueError(f"pairing is {pairing!r}; it must be 'half' or 'interleaved'")


@primitive
def smear(k, amount, before):
    """Each key mixed with the one before it: (1 - a) k_t + a k_{t-1}, a = sigmoid(amount).

    k (B,G,T,K); amount (G,K); before (B,G,K), the key before the first, an array that gets no
    gradient. An option (Config.key_smear): it hands every layer what a "previous token" head
    would have to learn. Olsson et al. 2022, arXiv:2209.11895, "smeared keys" (theirs: one a per
    head, ours one per head and channel).
    """
    xp = array_module(k, amount)
    mixed, blend_vjp = blend(k, xp.concatenate([before[:, :, None], k[:, :, :-1]], axis=2), amount)
    def vjp(dy):
        dk, dprevious, damount = blend_vjp(dy)
        dk[:, :, :-1] += dprevious[:, :, 1:]
        return dk, damount
    return mixed, vjp


def blend(k, previous, amount):
    """(1 - a) k + a previous, a = sigmoid(amount) (G,K), of keys (..,G,T,K); and the vjp, for all three."""
    a, difference = ops.stable_sigmoid(amount)[:, None], previous - k
    def vjp(dy):
        dprevious, da = a * dy, ops.unbroadcast(dy * difference, a.shape)
        return dy - dprevious, dprevious, (da * a * (1 - a))[:, 0]
    return k + a * difference, vjp


@primitive
def attention(q, k, v, causal=True, key_mask=None, scale=None, out=None, kernel=True):
    """softmax(q k^T / sqrt(K)) v.  q (B,H,T,K); k, v (B,G,S,K) -> (B,H,T,K)

    Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023,
    arXiv:2305.13245: query head h reads key/value head h // (H/G).
    causal: query t sees the keys up to its own position; with S > T the queries are the last
    T positions (what a KV cache needs). key_mask (B,S): 0 on keys nobody may see (padding).
    A query that sees no key gives zeros. scale: other than 1/sqrt(K). out: an array to write to.

    With S = q k^T / sqrt(K), P its softmax and O = P v:  dv = P^T dO,  dP = dO v^T,
    dS = P (dP - rowsum(dP P)),  dq = dS k / sqrt(K),  dk = dS^T q / sqrt(K),
    where rowsum(dP P) = rowsum(dO O): a sum over K terms and not over all keys.

    Queries are taken QUERIES at a time, with the keys that the last of them sees: causal attention
    computes little more than the half that counts, and never T x S scores at once. Where these are
    many, backward computes them again from the log-sum-exp of each row, as in FlashAttention-2
    (Dao 2023, arXiv:2307.08691).
    """
    xp = array_module(q, k, v)
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, K) or v.shape != k.shape or H % G or (causal and S < T):
        raise ValueError("expected q (B,H,T,K), k and v (B,G,S,K), G dividing H" + ", and S >= T when causal" * causal)
    if key_mask is not None and key_mask.shape != (B, S):
        raise ValueError(f"key_mask has shape {key_mask.shape}; expected (B,S), which is {(B, S)}")
    scale = K ** -0.5 if scale is None else scale
    if kernel and is_cupy(q):
        return on_gpu.attention(q, k, v, causal, key_mask, scale)
    padding = None if key_mask is None else ~xp.asarray(key_mask).astype(bool)[:, None, :, None]
    scaled_q = (q if scale == 1 else q * scale).reshape(B, G, H // G, T, K)
    out = xp.empty(q.shape, q.dtype) if out is None else out
    O = out.reshape(scaled_q.shape)
    if not S:
        out[...] = 0
    tiles = [slice(i, min(i + QUERIES, T)) for i in range(0, T, QUERIES)] if S else []
    kept = {}                   # by the tile's first query: exp(S - highest), or the log-sum-exp
    keep_scores = B * H * T * S <= SCORES_KEPT

    def of(x, tile):
        """Queries of a tile, (B,G,(H/G) t,K): the heads of a group share their keys, and so are rows of one product."""
        return x[..., tile, :].reshape(B, G, H // G * (tile.stop - tile.start), K)

    def scores(tile):
        """(B,G,S',(H/G) t), a column for each query: reductions over columns are the faster ones."""
        t, keys = tile.stop - tile.start, slice(0, S - T + tile.stop if causal else S)
        E = k[:, :, keys] @ of(scaled_q, tile).swapaxes(-1, -2)
        if causal and t > 1:
            xp.copyto(E.reshape(B, G, E.shape[2], H // G, t)[:, :, -t:], -xp.inf, where=xp.tri(t, t, -1, bool)[:, None])
        if padding is not None:
            xp.copyto(E, -xp.inf, where=padding[:, :, keys])
        return E, keys

    for tile in tiles:
        E, keys = scores(tile)
        highest = E.max(axis=-2, keepdims=True)
        if padding is not None:
            highest = xp.where(xp.isfinite(highest), highest, 0)
        E -= highest
        xp.exp(E, out=E)
        total = xp.ones((1, E.shape[2]), E.dtype) @ E
        total = xp.where(total > 0, total, 1)
        mixed = E.swapaxes(-1, -2) @ v[:, :, keys]
        mixed /= total.swapaxes(-1, -2)
        O[..., tile, :] = mixed.reshape(B, G, H // G, tile.stop - tile.start, K)
        kept[tile.start] = (E, total) if keep_scores else (None, highest + xp.log(total))

    def vjp(dy, dq=None, dk=None, dv=None):
        """Arrays may be given: dq is written there, dk and dv are added to what they hold."""
        dq, dk, dv = (xp.zeros(a.shape, a.dtype) if d is None else d for a, d in ((q, dq), (k, dk), (v, dv)))
        dy, dq_by_group = dy.reshape(O.shape), dq.reshape(O.shape)
        for tile in tiles:
            E, total = kept[tile.start]
            dO = of(dy, tile)
            if E is None:
                E, keys = scores(tile)
                E -= total
                xp.exp(E, out=E)                                # P
            else:
                keys = slice(0, E.shape[2])
                dO = dO / total.swapaxes(-1, -2)                # P = E / total, which is never formed
            dS = v[:, :, keys] @ dO.swapaxes(-1, -2)            # dP, and turned into dS in place
            dS -= _dot_rows(dO, of(O, tile)).swapaxes(-1, -2)
            dS *= E
            dq_by_group[..., tile, :] = (dS.swapaxes(-1, -2) @ k[:, :, keys]).reshape(dq_by_group[..., tile, :].shape)
            dk[:, :, keys] += dS @ of(scaled_q, tile)
            dv[:, :, keys] += E @ dO
        if scale != 1:
            dq *= scale
        return dq, dk, dv
    return out, vjp


@primitive
def segment_attention(qkv, cos, sin, heads, kv_heads, plan, pairing="half"):
    """packing.packed_attention without smearing, on a GPU: (N,(H+2G)K) -> (N,H K)"""
    return on_gpu.segment_attention(qkv, cos, sin, heads, kv_heads, plan, pairing)


def decode_attention(q, keys, values, length, first=None, kernel=True):
    """attention for the last position alone, on arrays, without a gradient.  q (B,H,K) -> (B,H,K)

    keys, values (B,G,capacity,K), `length` positions filled in; first (B,): where each row's keys begin, int32, or None.
    """
    xp, (B, H, K), G = array_module(q, keys, values), q.shape, keys.shape[1]
    if kernel and is_cupy(q):
        return decode.decode(xp.ascontiguousarray(q), keys, values, length, first)
    k, v = keys[:, :, :length], values[:, :, :length]
    E = (q * K ** -0.5).reshape(B, G, H // G, K) @ k.swapaxes(-1, -2)
    if first is not None:
        xp.copyto(E, -xp.inf, where=(xp.arange(length) < first[:, None])[:, None, None, :])
    E -= E.max(axis=-1, keepdims=True)
    xp.exp(E, out=E)
    mixed = E @ v
    mixed /= E.sum(axis=-1, keepdims=True)
    return mixed.reshape(B, H, K)


@primitive
def token_log_probs(hidden, unembedding, targets, chunk=None, kernel=True):
    """log softmax(hidden unembedding^T)[target].  (..,D), (V,D), integers (..) -> (..)

    It does not shift: for next-token log-probs pass hidden[:, :-1] and tokens[:, 1:].
    The logits (..,V) are never held at once: rows are taken `chunk` at a time (as many as
    fit LOGITS_HELD by default). With p = softmax(logits) and e the one-hot target,
    dlogits = dy (e - p),  dhidden = dlogits U,  dU = dlogits^T hidden;  backward computes p again,
    unless there was one chunk only.
    Raises IndexError for a target outside the vocabulary.
    """
    xp = array_module(hidden, unembedding)
    V, D = unembedding.shape
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != D:
        raise ValueError("expected hidden (..,D), unembedding (V,D), targets (..)")
    if targets.size and not 0 <= int(targets.min()) <= int(targets.max()) < V:
        raise IndexError(f"targets from {int(targets.min())} to {int(targets.max())}, vocabulary {V}")
    rows, flat = hidden.reshape(-1, D), xp.asarray(targets).reshape(-1)
    N = len(rows)
    chunk = max(1, LOGITS_HELD // V) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if kernel and is_cupy(hidden):
        return on_gpu.token_log_probs(hidden, unembedding, flat, chunk)
    chunks = [slice(i, i + chunk) for i in range(0, N, chunk)]

    def exponentials(s):
        """exp(logits - highest) of a chunk, their sums, the log-probs; a few rows at a time, which stay in the cache."""
        E = rows[s] @ unembedding.T
        picked, total = xp.empty((2, len(E)), E.dtype)
        step = max(1, IN_CACHE // V)
        for i in range(0, len(E), step):
            b = E[i:i + step]
            b -= b.max(axis=-1, keepdims=True)
            picked[i:i + step] = b[xp.arange(len(b)), flat[s][i:i + step]]
            xp.exp(b, out=b)
            b.sum(axis=-1, out=total[i:i + step])
        return E, total, picked - xp.log(total)

    log_probs, kept = xp.empty(N, hidden.dtype), []
    for s in chunks:
        E, total, log_probs[s] = exponentials(s)
        if len(chunks) == 1:
            kept.append((E, total))

    def vjp(dy):
        dy = dy.reshape(-1)
        dhidden = xp.empty_like(rows)
        dunembedding = None if len(chunks) == 1 else xp.zeros_like(unembedding)
        for s in chunks:
            E, total = kept.pop() if kept else exponentials(s)[:2]
            dlogits = xp.multiply(E, (-dy[s] / total)[:, None], out=E)
            dlogits[xp.arange(len(E)), flat[s]] += dy[s]
            xp.matmul(dlogits, unembedding, out=dhidden[s])
            product = DeferredMatmul(dlogits.T, rows[s])
            if len(chunks) == 1:
                dunembedding = product
            else:
                product.add_to(dunembedding)
        return dhidden.reshape(hidden.shape), dunembedding
    return log_probs.reshape(targets.shape), vjp


def sequence_log_probs(log_probs, mask):
    """Sum of the log-probs (B,T) where mask (B,T) is 1, one per sequence: (B,).

    What the mask leaves out may be NaN.
    """
    xp = array_module(mask)
    return ops.sum(ops.where(xp.asarray(mask).astype(bool), log_probs, 0.0), axis=-1)
