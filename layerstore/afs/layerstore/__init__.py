"""Everything about bytes: sources of images, .afslyr files, the cache of a node, chunks between peers."""
