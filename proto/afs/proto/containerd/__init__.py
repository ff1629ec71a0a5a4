"""containerd's own API, as far as AFS serves it."""
