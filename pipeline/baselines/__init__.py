"""What a user would do instead of a mask: examples in the context, a steering vector."""
