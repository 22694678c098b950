"""Models: what differs between families as data, the parameters, and one decoder that runs them all."""
