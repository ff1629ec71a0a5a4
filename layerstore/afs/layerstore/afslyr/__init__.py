"""The ``.afslyr`` format: a layer's tar, byte for byte, with an EROFS index around it. See docs/afslyr.md."""
