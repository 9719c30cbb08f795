"""The shipped configuration: a package, so that it travels inside of `spray`."""
