"""Models: families as data, parameters, and one decoder for all of them."""
