"""The paged KV cache: page pool on the device, scales, page allocator, and its configuration."""
