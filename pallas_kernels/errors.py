"""The error of a kernel that does not support its arguments or this device."""


class NotSupported(Exception):
    """The kernels do not support this; the message says what they do support. Callers fall back."""
