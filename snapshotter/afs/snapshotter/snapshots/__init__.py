"""containerd's door: the Snapshots API, over local directories and the cluster's layers."""
