"""What a kernel answers when it cannot do what it is asked."""


class NotSupported(Exception):
    """These kernels cannot do that; the message says what they can. Whoever calls falls back on something else."""
