"""What a GPU proves: python -m slimllm_nb.gpu."""
