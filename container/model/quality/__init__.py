"""What a quantization costs in quality, measured on the path that serves."""
