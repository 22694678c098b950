"""The paged KV cache: page pool on the device, scales, page allocator, and what a model gets."""
