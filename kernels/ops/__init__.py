"""One folder per op: ``__init__`` says what the op means (schema, checks, fake kernel, dispatch),
``reference`` computes it in plain PyTorch, further modules hold faster backends."""
