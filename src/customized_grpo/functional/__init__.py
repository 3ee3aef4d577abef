"""The ground floor: pure functions, tensors in, tensors out. No module here knows a model, a dataset or a file."""
