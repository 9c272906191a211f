"""One file an op: schema, checks, dispatch, autograd, docstring."""
