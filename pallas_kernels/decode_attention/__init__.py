"""Attention of one decode step over a cache, its keys split over thread blocks.

Two phases of a grid, which decode_step makes tasks of its list.

split_attention    the phase that takes a row's keys in splits
    new_token      queries, the new key and value from partial sums: norm, RoPE, scores
    chunk_ring     keys and values through shared memory, online softmax
merge_splits       the phase that adds the splits
reference          the same in plain jnp
"""
