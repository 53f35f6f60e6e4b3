"""Parts that methods are composed of: encoders, heads, momentum encoder, queue, batch norm, convolution."""
