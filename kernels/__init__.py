"""Index of the attention ops; `kernels.reference` holds the specification of each.

    paged_kv   store_kv, store_index_keys, gather_pages
    prefill    prefill_dense, prefill_windowed
    indexer    project_index, score_blocks, select_blocks, count_attended
    decode     decode_sparse, decode_windowed, decode_dense (window_plan: what a step shares)

Nothing is imported here: Hugging Face has a distribution of the same name, and `transformers`
probes it by version. `__version__` tells it that this one is not for use.
"""

__version__ = "0.0.0"
