"""What a device is, how it is doing, and how much solver work that allows it."""
