"""Running one command in an image: admission, upload, the container, the diff."""
