"""Index of the attention ops; `kernels.reference` is the specification of each (`*_reference`).

    paged_kv   store_kv, store_index_keys, gather_pages
    prefill    prefill_dense, prefill_windowed
    prefill_sparse   score_tiles, select_tiles, prefill_sparse (prefill_tiles: queries in tiles)
    indexer    project_index, score_blocks, select_blocks, count_attended (block_age: what the two
               score_* add for how far back a block lies)
    decode     decode_sparse, decode_windowed, decode_dense (window_plan: what a step shares)

On a GPU, decoding has CUDA kernels (`csrc`, compiled by `_build`, loaded by `_launch`):

    cuda_decode    attend: a layer in two launches (head_tiles, decode_inputs, decode_workspace,
                   decode_grid: what each CTA or cluster takes)
    cuda_select    list_blocks: the first of the two, which scores and selects
    cuda_prefill   attend_spans: prefill of some heads of a layer, on chips of the Hopper generation
    cuda_store     store_qkv: from a layer's projection to where attention reads (layer_inputs)
    cuda_layer     add_norm, silu_mul: between the layer's products (the specification of all
                   three is layer_reference)
    cuda_step      place_rows, pick_tokens: the ends of a decode step (step_ops: in PyTorch)
    cuda_experts   route_experts, gate_experts, project_experts: a mixture of experts at decode
    cuda_ops       the ops of indexer and decode on the same kernels, one at a time

Prefill on a GPU begins at device_prefill (span_inputs: what its kernels take). On chips other than
Hopper it is a Triton kernel (prefill_triton, span_attention); prefill_libraries does dense prefill
by cuDNN, FlashAttention-2 or FlashInfer. Sparse prefill begins at device_sparse_prefill; its Triton
kernels are tile_scores, block_choice and list_attention.

Nothing is imported here: Hugging Face has a distribution of the same name, and `transformers`
probes it by version. `__version__` tells it that this one is not for use.
"""

__version__ = "0.0.0"
