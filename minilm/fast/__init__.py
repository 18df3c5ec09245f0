"""One speed trick per file. Each computes the numbers of a plain function, which the tests hold it to at 1e-10.

    file                      the trick                                          equals
    tiled_attention           attention tile by tile, without the masked half    layers.attention_without_tiles
    chunked_log_probs         the logits of some tokens at a time                layers.token_log_probs_without_chunks
    packed_attention          no padding; a shared prompt computed once          plain.attention on each dialogue
    cached_decoding           a new token costs one token's work                 plain.generate
    flat_parameters           AdamW over one long vector                         plain.adamw
    deferred                  weight gradients computed where they are stored    the same vjp with arrays
    activation_checkpointing  recompute instead of keep                          the function itself
    workers                   processes that share a batch                       one process, up to rounding
    malloc                    glibc keeps freed memory                           the same program

The gain of each in time and memory: `python scripts/bench/tricks.py`, and the table in scripts/bench/README.md.
"""
