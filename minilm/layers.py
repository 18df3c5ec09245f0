"""The fused primitives of a transformer, forward and backward by hand.

One node of the graph each, so that training spends its time in a few large operations.
`formulas.py` says the same plainly, from elementary operations; the tests hold the two
together. Shapes: B batch, T tokens, V vocabulary, D width, H query heads, G key/value
heads (G divides H), K head width, F hidden width of the feed-forward.
"""

from minilm import ops
from minilm.backend import array_module
from minilm.tensor import primitive

# Rows of logits held at a time by token_log_probs: 2^22 elements are 16 MB in float32.
LOGITS_HELD = 1 << 22


@primitive
def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis.  (..,D), (D,) -> (..,D)

    Zhang and Sennrich 2019, arXiv:1910.07467. With n = x r the normalised input, r the
    reciprocal root, and dn = dy weight:  dx = r (dn - n mean(dn n)), the second term because
    dr/dx = -r^3 x / D.
    """
    xp = array_module(x)
    D = x.shape[-1]
    r = 1 / xp.sqrt(_dot_rows(x, x) / D + eps)
    n = x * r
    def vjp(dy):
        dn = dy * n
        dweight = xp.ones(dn.size // D, dn.dtype) @ dn.reshape(-1, D)        # a sum over rows
        xp.multiply(dy, weight, out=dn)
        dx = n * (_dot_rows(dn, n) / -D)
        dx += dn
        dx *= r
        return dx, dweight
    return n * weight, vjp


def _dot_rows(a, b):
    """sum(a * b) over the last axis, which is kept; no product is formed in memory."""
    return array_module(a).einsum("...d,...d->...", a, b)[..., None]


@primitive
def swiglu(gate_up):
    """silu(gate) * up, with gate and up the two halves of the last axis.  (..,2F) -> (..,F)

    Shazeer 2020, arXiv:2002.05202. silu(g) = g s with s = sigmoid(g), and
    silu'(g) = s + silu(g) (1 - s).
    """
    xp = array_module(gate_up)
    width = gate_up.shape[-1] // 2
    if gate_up.shape[-1] % 2:
        raise ValueError("the last axis holds gate and up side by side; its length must be even")
    gate, up = gate_up[..., :width], gate_up[..., width:]
    s = xp.multiply(gate, 0.5)                 # the sigmoid, without branches: 1/2 + tanh(gate/2) / 2
    xp.tanh(s, out=s)
    s *= 0.5
    s += 0.5
    silu = gate * s
    def vjp(dy):
        dx = xp.empty_like(gate_up)
        dgate, dup = dx[..., :width], dx[..., width:]
        xp.subtract(1, s, out=dgate)
        dgate *= silu
        dgate += s
        dgate *= up
        dgate *= dy
        xp.multiply(dy, silu, out=dup)
        return dx
    return silu * up, vjp


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
    if pairing not in ("half", "interleaved"):
        raise ValueError(f"pairing is {pairing!r}; it must be 'half' or 'interleaved'")
    half = x.shape[-1] // 2
    turn = cos + 1j * sin                   # exp(i angle)

    def rotate(a, turn):
        """As complex numbers: one pass over memory, whatever the pairing."""
        z = xp.empty((*a.shape[:-1], half), turn.dtype)
        z.real, z.imag = (a[..., :half], a[..., half:]) if pairing == "half" else (a[..., 0::2], a[..., 1::2])
        z *= turn
        if pairing == "interleaved":
            return z.view(a.dtype)
        return xp.concatenate([z.real, z.imag], axis=-1)

    def vjp(dy):
        return rotate(dy, turn.conj())
    return rotate(x, turn), vjp


@primitive
def smear(k, amount, before):
    """Each key mixed with the one before it: (1 - a) k_t + a k_{t-1}, a = sigmoid(amount).

    k (B,G,T,K); amount (G,K); before (B,G,K), the key before the first, an array that gets no
    gradient. An option (Config.key_smear): it hands every layer what a "previous token" head
    would have to learn. Olsson et al. 2022, arXiv:2209.11895, "smeared keys" (theirs: one a per
    head, ours one per head and channel).
    """
    xp = array_module(k, amount)
    a = ops.stable_sigmoid(amount)[:, None]
    previous = xp.concatenate([before[:, :, None], k[:, :, :-1]], axis=2)
    def vjp(dy):
        dk = (1 - a) * dy
        dk[:, :, :-1] += a * dy[:, :, 1:]
        da = (dy * (previous - k)).sum(axis=(0, 2))
        return dk, da * (a * (1 - a))[:, 0]
    return (1 - a) * k + a * previous, vjp


def attention_mask(T, S, causal, key_mask, xp):
    """True where a query (T of them, the last T of S positions) may look at a key.

    Broadcasts against (B,H,T,S); None if every query sees every key.
    """
    allowed = None
    if causal and T > 1:
        allowed = xp.arange(S) <= xp.arange(S - T, S)[:, None]
    if key_mask is not None:
        seen = xp.asarray(key_mask).astype(bool)[:, None, None, :]
        allowed = seen if allowed is None else allowed & seen
    return allowed


@primitive
def attention(q, k, v, causal=True, key_mask=None):
    """softmax(q k^T / sqrt(K)) v.  q (B,H,T,K); k, v (B,G,S,K) -> (B,H,T,K)

    Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023,
    arXiv:2305.13245: query head h reads key/value head h // (H/G).
    causal: query t sees the keys up to its own position; with S > T the queries are the last
    T positions (what a KV cache needs). key_mask (B,S): 0 on keys nobody may see (padding).
    A query that sees no key gives zeros.

    With S = q k^T / sqrt(K), P its softmax and O = P v:  dv = P^T dO,  dP = dO v^T,
    dS = P (dP - rowsum(dP P)),  dq = dS k / sqrt(K),  dk = dS^T q / sqrt(K),
    where rowsum(dP P) = rowsum(dO O): a sum over K terms and not over all keys.
    """
    xp = array_module(q, k, v)
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, K) or v.shape != k.shape or H % G or (causal and S < T):
        raise ValueError("expected q (B,H,T,K) and k, v (B,G,S,K) with G dividing H"
                         + (", and S >= T when causal" if causal else ""))
    group = H // G
    # The heads of a group share their keys: their queries are rows of one product.
    scaled_q = (q * K ** -0.5).reshape(B, G, group * T, K)
    E = scaled_q @ k.swapaxes(-1, -2)
    allowed = attention_mask(T, S, causal, key_mask, xp)
    if allowed is not None:
        xp.copyto(E.reshape(B, H, T, S), -xp.inf, where=~allowed)
    highest = E.max(axis=-1, keepdims=True) if S else E
    if allowed is not None and key_mask is not None:
        highest = xp.where(xp.isfinite(highest), highest, 0)
    E -= highest
    xp.exp(E, out=E)
    total = E @ xp.ones((S, 1), E.dtype)
    scale = 1 / xp.where(total > 0, total, 1)                   # P = E * scale, which is never formed
    O = E @ v
    O *= scale

    def vjp(dy):
        dO = dy.reshape(B, G, group * T, K) * scale
        dv = E.swapaxes(-1, -2) @ dO
        dS = dO @ v.swapaxes(-1, -2)                            # dP, and turned into dS in place
        dS -= _dot_rows(dO, O)
        dS *= E
        dq = (dS @ k) * K ** -0.5
        dk = dS.swapaxes(-1, -2) @ scaled_q
        return dq.reshape(q.shape), dk, dv
    return O.reshape(q.shape), vjp


@primitive
def token_log_probs(hidden, unembedding, targets, chunk=None):
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
    rows, flat = hidden.reshape(-1, D), targets.reshape(-1)
    N = len(rows)
    chunk = max(1, LOGITS_HELD // V) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    chunks = [slice(i, i + chunk) for i in range(0, N, chunk)]
    kept = {}

    def softmax_and_log_probs(s):
        logits = rows[s] @ unembedding.T
        logits -= logits.max(axis=-1, keepdims=True)
        picked = logits[xp.arange(len(logits)), flat[s]]
        p = xp.exp(logits, out=logits)
        total = p.sum(axis=-1, keepdims=True)
        p /= total
        return p, picked - xp.log(total[:, 0])

    log_probs = xp.empty(N, hidden.dtype)
    for s in chunks:
        p, log_probs[s] = softmax_and_log_probs(s)
        if len(chunks) == 1:
            kept[0] = p

    def vjp(dy):
        dy = dy.reshape(-1)
        dhidden, dunembedding = xp.empty_like(rows), xp.zeros_like(unembedding)
        for s in chunks:
            p = kept.pop(0) if kept else softmax_and_log_probs(s)[0]
            dlogits = xp.multiply(p, -dy[s, None], out=p)
            dlogits[xp.arange(len(p)), flat[s]] += dy[s]
            dhidden[s] = dlogits @ unembedding
            dunembedding += dlogits.T @ rows[s]
        return dhidden.reshape(hidden.shape), dunembedding
    return log_probs.reshape(targets.shape), vjp


def sequence_log_probs(log_probs, mask):
    """Sum of the log-probs (B,T) where mask (B,T) is 1, one per sequence: (B,).

    What the mask leaves out may be NaN.
    """
    xp = array_module(mask)
    return ops.sum(ops.where(xp.asarray(mask).astype(bool), log_probs, 0.0), axis=-1)
