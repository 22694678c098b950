"""The paged KV cache: pages on the device, scales, and the host's bookkeeping of who owns which page."""
