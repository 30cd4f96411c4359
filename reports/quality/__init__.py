"""Quality per byte: compressed models beside the quantisers that people use."""
