"""What a protocol measures on each model. One file a measurement."""
