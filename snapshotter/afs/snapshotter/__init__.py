"""Everything about mounts: layers as EROFS, on local files or over FUSE, and root file systems as overlayfs."""
