"""What layers share: norms, rotary positions, the short convolution, decays and key-value memories."""
