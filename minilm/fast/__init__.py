"""One speed trick per file. Each computes the numbers of a plain function, which the tests hold it to at 1e-10.

    file                      the trick                                          equals
    tiled_attention           attention tile by tile, without the masked half    layers.attention_without_tiles
    chunked_log_probs         the logits of some tokens at a time                layers.token_log_probs_without_chunks
    packed_attention          no padding; a shared prompt computed once          plain.self_attention on each dialogue
    cached_decoding           a new token costs one token's work                 plain.generate
    few_rows                  logits by products too small to be copied          hidden @ unembedding^T
    flat_parameters           AdamW over one long vector                         plain.adamw
    deferred                  a weight gradient computed where it is stored      a vjp that returns them at once
    activation_checkpointing  recompute instead of keep                          the function itself
    workers                   processes that share a batch                       one process, up to rounding
    malloc                    glibc keeps freed memory                           the same program

From plain.py to here:

    self_attention   model.Transformer.hidden: packed_attention (the usual case), or padded_attention and
                     layers.attention (padding, encoders). On a CPU both end in tiled_attention; the derivation is in
                     layers.attention
    log_probs        Transformer.log_probs, layers.token_log_probs, chunked_log_probs
    generate         generate.generate, cached_decoding, few_rows
    adamw            optim.AdamW, flat_parameters
    the losses       objectives/

The gain of each in time and memory: `python scripts/bench/tricks.py`, and the table in scripts/bench/README.md.
"""
