"""Foundation of the package: errors, options, number formats, pytrees, logging."""
