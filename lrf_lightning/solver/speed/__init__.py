"""Time and memory of the compressed model beside the original."""
