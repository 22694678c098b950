"""The engine: requests on the host, one compiled step on the device, and the loop between them."""
