"""Hugging Face checkpoints and Megatron-Core parameters: one table per architecture, both directions.

``shape``          what a Hugging Face config says, as numbers (``ModelShape``) and tensor descriptions (``TensorSpec``)
``tables``         per architecture: parameter-name patterns and how each tensor is cut
``weight_map``     the table of one model with its sizes: every parameter, both ways
``cutting``        full tensors to the shard of one tensor-parallel rank, and back
``manifest``       what each pipeline stage publishes, in which order and in which buckets
``hf_checkpoint``  safetensors folders: checked reading, atomic writing
``gguf_import``    llama.cpp files of the Llama family
``comparison``     two checkpoints tensor by tensor

Pure: no Megatron, no torch.distributed. Live publishing and tools/convert_hf_checkpoint.py use the same tables.
"""
