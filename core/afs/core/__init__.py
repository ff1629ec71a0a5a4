"""What every AFS service shares: errors, digests, configuration, gRPC set-up, processes, mounts."""
